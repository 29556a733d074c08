"""A vision transformer whose MLPs are pruned: inference, dense and with them in each storage.

The weights of the MLPs keep the tiles with the largest mean of |W|; all other weights are dense.
Checked before it is timed: the logits of the first images against the same model of dense layers
and plain attention, with the weights that the method holds (for `semi_structured` the largest two
of every four).

    floor = the larger of arithmetic, counting kept tiles alone, and of the bytes of the weights
"""

import copy
from dataclasses import replace

import torch
import torch.compiler.config as compiler
from torch import Tensor, nn

from blockshock import masks
from blockshock.block_sparse import sparsify, tiles
from blockshock.measure.errors import Figure, figure, relative_error
from blockshock.measure.floor import product_cost
from blockshock.measure.regions import region
from blockshock.phases.block_sparse import layers
from blockshock.phases.block_sparse.case import BlockSparseCase
from blockshock.phases.experiment import Experiment
from blockshock.sources import generator
from blockshock.transformer.vision import VisionTransformer, compile_vision

CHECKED = 8  # images whose logits are compared
BOUND = 1.5  # times the yardstick's error, which rounding makes anew in every block
SAME = 1e-5  # a relative error that passes in fp32: sums in another order
COMPILATIONS = 64  # of one function, which PyTorch keeps: the cases of a point need more than 8


class Drawn:
    """The model of a point with its first weights in float32, and images [B, 3, image, image].

    The head's weights are drawn as well: at first they are 0, and so were all logits.
    """

    def __init__(self, case: BlockSparseCase, device: torch.device):
        self.case, self.device = case, device
        self.truth_dtype = torch.float64 if case.dtype == "fp32" else torch.float32
        if case.compiled:
            torch.compiler.reset()
            compiler.recompile_limit = COMPILATIONS
        drawn = generator(device, "block_sparse/model", case.problem_seed)
        with device:
            self.model = VisionTransformer(case.config, generator=drawn)
            nn.init.normal_(self.model.head.weight, std=case.K**-0.5, generator=drawn)
            size = case.B, case.config.channels, case.image, case.image
            self.images = torch.randn(size, generator=drawn)

    def warm_up(self) -> None:
        """Nothing: the check runs a step first."""

    def pruned(self, weight: Tensor) -> Tensor:
        """A weight [N, K] without the tiles that are dropped."""
        square = self.case.block, self.case.block
        kept = tiles.keep_top(tiles.magnitude(weight, square), self.case.sparsity)
        return tiles.masked(weight, kept, square)

    def plain(self, dtype: torch.dtype) -> VisionTransformer:
        """A copy in `dtype` with attention by its definition."""
        model = copy.deepcopy(self.model).to(dtype)
        for block in model.blocks:
            block.config = replace(block.config, attention="reference")
        return model


class Problem(Drawn):
    """The model with its MLPs pruned, in the case's dtype."""

    def __init__(self, case: BlockSparseCase, device: torch.device):
        super().__init__(case, device)
        with torch.no_grad():
            for weight in mlp_weights(self.model):
                weight.copy_(self.pruned(weight))
        self.model.to(case.torch_dtype).requires_grad_(False)
        self.images = self.images.to(case.torch_dtype)
        self._truths: dict[bool, tuple[Tensor, float]] = {}

    def truth(self, method: str) -> tuple[Tensor, float]:
        """The true logits of the first images, and the yardstick's error."""
        halved = method == "semi_structured"
        if halved not in self._truths:
            true, plain = (self._dense(halved, t) for t in (self.truth_dtype, self.images.dtype))
            self._truths[halved] = true, relative_error(plain, true)
        return self._truths[halved]

    @torch.no_grad()
    def _dense(self, halved: bool, dtype: torch.dtype) -> Tensor:
        model = self.plain(dtype)
        for weight in mlp_weights(model) if halved else ():
            weight.mul_(masks.make("magnitude", weight))
        return model(self.images[:CHECKED].to(dtype))


def mlp_weights(model: VisionTransformer) -> list[Tensor]:
    """The weights that are pruned."""
    return [layer.weight for block in model.blocks for layer in (block.mlp.up, block.mlp.down)]


def build(case: BlockSparseCase, problem: Problem) -> VisionTransformer:
    """The model with its MLPs in the case's storage.

    Raises ValueError where a layer of them cannot be held so.
    """
    model = copy.deepcopy(problem.model).eval()
    if case.method != "dense":
        report = sparsify(
            model,
            "*.mlp.*",
            storage=case.method,
            block=case.block,
            sparsity=case.sparsity,
            fuse=case.method == "bsr",
        )
        if len(report.replaced) != len(mlp_weights(problem.model)):
            raise ValueError(f"not every layer of the MLPs can be held so: {report}")
    return compile_vision(model) if case.compiled else model


def model(case: BlockSparseCase, built: VisionTransformer, problem: Problem) -> Experiment:
    """The logits of a batch of images, nothing recorded for a backward."""

    def step():
        with torch.no_grad(), region("forward"):
            return built(problem.images)

    def check() -> dict[str, Figure]:
        enough = SAME if case.dtype == "fp32" else 0.0
        logits = step()[:CHECKED]
        true = problem.truth(case.method)
        return {"output": figure(logits, *true, bound=BOUND, enough=enough)}

    return Experiment(step, check, "forward")


def figures(
    case: BlockSparseCase, built: VisionTransformer, problem: Problem, experiment, ceilings
) -> dict:
    """For the result: memory, work, floor, paths."""
    weights = sum(p.nbytes for p in built.parameters())
    flops, floor = forward_flops(case, built), None
    if ceilings is not None:
        terms = {
            "compute": flops / ceilings["matrix_flops"][case.dtype],
            "memory": (weights + problem.images.nbytes) / ceilings["copy_bytes_per_s"],
            "wire": 0.0,
        }
        floor = {"seconds": max(terms.values()), **terms}
    own = layers.paths(built.blocks[0].mlp.up, case.B * case.config.tokens)
    return {
        "memory": {"weight_bytes": weights},
        "work": {"flops": flops, "dense_flops": forward_flops(case, problem.model)},
        "floor": floor,
        "paths": {"attention": case.config.attention_on(problem.device.type), **own},
    }


def rates(case: BlockSparseCase, seconds: float, outcome: dict) -> dict:
    """Images and their tokens a second; operations of the dense model."""
    return {
        "images_per_s": case.B / seconds,
        "tokens_per_s": case.B * case.config.tokens / seconds,
        "dense_tflops": outcome["work"]["dense_flops"] / seconds / 1e12,
        "limit_fraction": outcome["floor"]["seconds"] / seconds,
    }


def forward_flops(case: BlockSparseCase, model: VisionTransformer) -> float:
    """Operations of a forward: those of kept tiles alone where layers hold nothing else."""
    config = case.config
    rows, patches = case.B * config.tokens, case.B * (config.tokens - 1)
    total = 2 * patches * model.patches.weight.numel() + 2 * case.B * model.head.weight.numel()
    for block in model.blocks:
        for layer in (block.qkv, block.out, block.mlp.up, block.mlp.down):
            if isinstance(layer, nn.Linear):
                total += product_cost(rows, *layer.weight.shape, layer.weight.itemsize).flops
            else:
                total += layer.cost(rows).flops
        total += 4 * rows * config.tokens * config.width  # q kᵀ and its product with v
    return total
