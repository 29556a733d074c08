"""The laboratory of block-sparse layers: case, axes, and a module for each question.

Such a module has `Problem` (data and truth), `build` (what is measured), the functions of its
phases, `figures` and `rates`.
"""

import torch

from blockshock.phases.axes import combine
from blockshock.phases.block_sparse import layers, models, planning, supermask
from blockshock.phases.block_sparse.case import OF_PHASE, BlockSparseCase
from blockshock.phases.family import Family

# Phase -> (module, its function).
PHASES = {
    "forward": (layers, layers.forward),
    "backward": (layers, layers.backward),
    "planning": (planning, planning.planning),
    "model": (models, models.model),
    "supermask": (supermask, supermask.supermask),
}


def expand(case: type[BlockSparseCase], axes: dict, phase: str, ranks: int) -> list:
    """Every combination of the axes, for the methods that the phase has."""
    own = {**axes, "method": [name for name in axes["method"] if name in OF_PHASE[phase]]}
    return combine(case, own, phase, ranks)


def problem(case: BlockSparseCase, device: torch.device):
    """Data and truth of a point."""
    return PHASES[case.phase][0].Problem(case, device)


def build(case: BlockSparseCase, of: object):
    """What is measured."""
    return PHASES[case.phase][0].build(case, of)


def figures(case: BlockSparseCase, *given) -> dict:
    """For the result."""
    return PHASES[case.phase][0].figures(case, *given)


def rates(case: BlockSparseCase, seconds: float, outcome: dict) -> dict:
    """For the result."""
    return PHASES[case.phase][0].rates(case, seconds, outcome)


FAMILY = Family(
    case=BlockSparseCase,
    phases={name: function for name, (_, function) in PHASES.items()},
    problem=problem,
    build=build,
    figures=figures,
    rates=rates,
    expand=expand,
    changed=lambda built: built.parameters(),
    ranks=1,
    # The optimizer's step and autograd's own streams are as users run them: eager.
    timings={"supermask": ("events", "sync")},
)
