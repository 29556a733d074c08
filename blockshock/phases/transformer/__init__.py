"""The laboratory of tensor parallelism: case, axes, and a module for each question.

Such a module has `Problem` (data and truth), `Run` (what is measured), the functions of its phases,
`figures` and `rates`.
"""

import torch

from blockshock.phases.family import Family
from blockshock.phases.transformer import axes, decode, hybrid, sync
from blockshock.phases.transformer.case import TransformerCase

# Phase -> (module, its function).
PHASES = {
    "sync": (sync, sync.sync),
    "decode": (decode, decode.decode),
    "hybrid_forward": (hybrid, hybrid.hybrid_forward),
    "hybrid_backward": (hybrid, hybrid.hybrid_backward),
}


def problem(case: TransformerCase, device: torch.device):
    """Data and truth of a point."""
    return PHASES[case.phase][0].Problem(case, device)


def build(case: TransformerCase, of: object):
    """What is measured."""
    return PHASES[case.phase][0].Run(case, of)


def figures(case: TransformerCase, *given) -> dict:
    """For the result."""
    return PHASES[case.phase][0].figures(case, *given)


def rates(case: TransformerCase, seconds: float, outcome: dict) -> dict:
    """For the result."""
    return PHASES[case.phase][0].rates(case, seconds, outcome)


FAMILY = Family(
    case=TransformerCase,
    phases={name: function for name, (_, function) in PHASES.items()},
    problem=problem,
    build=build,
    figures=figures,
    rates=rates,
    expand=axes.expand,
    changed=lambda run: run.model.parameters(),
    usuals=lambda case: {"usual": {"reduce": "collective"}},
    # The optimizer's step and autograd's own streams are as users run them: eager.
    timings={"sync": ("events", "sync")},
    benches=("sync", "hybrid"),
)
