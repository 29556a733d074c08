"""What it costs that the mask is new in a step: its lists are made again, beside the product.

    plan    the lists of a tile mask (`kernels.block_lists`), the number of its tiles being known
    bsr     the product of a layer by such lists

Checked before it is timed: the lists, entry by entry, against those that plain PyTorch makes on the
CPU; the product as in `layers`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockshock.kernels import block_lists
from blockshock.measure.errors import Figure, figure
from blockshock.measure.regions import region
from blockshock.phases.block_sparse import layers
from blockshock.phases.block_sparse.case import PLANNED, BlockSparseCase
from blockshock.phases.block_sparse.layers import Problem
from blockshock.phases.experiment import Experiment

__all__ = ["Problem", "build", "figures", "planning", "rates"]


@dataclass
class Planner:
    """Makes the lists of a mask [R, C] that keeps `kept` tiles."""

    mask: Tensor
    kept: int

    def __call__(self) -> block_lists.Lists:
        """The lists; nothing waits for the device."""
        return block_lists.lists(self.mask, self.kept)

    def parameters(self) -> tuple:
        """Nothing is trained."""
        return ()


def build(case: BlockSparseCase, problem: Problem) -> Planner | nn.Module:
    """What makes the lists, or the layer that multiplies by them."""
    if case.method == PLANNED:
        return layers.build(case, problem)
    return Planner(problem.mask, problem.kept)


def planning(case: BlockSparseCase, built: Planner | nn.Module, problem: Problem) -> Experiment:
    """The lists of a mask that is new in each step, and beside it the product by them."""
    if case.method == PLANNED:
        return layers.forward(case, built, problem)

    def step():
        with torch.no_grad(), region("plan"):
            return built()

    def check() -> dict[str, Figure]:
        found = step().tensors()
        right = block_lists.lists_reference(problem.mask.cpu(), problem.kept).tensors()
        found, right = (torch.cat([t.flatten().double().cpu() for t in x]) for x in (found, right))
        return {"output": figure(found, right, 0.0)}  # whole numbers: equal, or wrong

    return Experiment(step, check, "forward")


def figures(
    case: BlockSparseCase, built: Planner | nn.Module, problem: Problem, experiment, ceilings
) -> dict:
    """For the result: memory, floor, paths. The floor of a plan is to read the mask once and to
    write the lists once."""
    if case.method == PLANNED:
        return layers.figures(case, built, problem, experiment, ceilings)
    size, floor = built().nbytes, None
    if ceilings is not None:
        seconds = (problem.mask.nbytes + size) / ceilings["copy_bytes_per_s"]
        floor = {"seconds": seconds, "compute": 0.0, "memory": seconds, "wire": 0.0}
    kernel = "Triton kernels" if problem.mask.is_cuda else "plain PyTorch"
    return {
        "memory": {"list_bytes": size},
        "work": {"kept_tiles": problem.kept, "tiles": problem.mask.numel()},
        "floor": floor,
        "paths": {"plan": kernel},
    }


def rates(case: BlockSparseCase, seconds: float, outcome: dict) -> dict:
    """Of the product, as those of a forward; of a plan, tiles of the whole grid a second."""
    if case.method == PLANNED:
        return layers.rates(case, seconds, outcome)
    return {
        "tiles_per_s": outcome["work"]["tiles"] / seconds,
        "limit_fraction": outcome["floor"]["seconds"] / seconds,
    }
