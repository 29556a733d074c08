"""What differs by family: how its cases are made, run, checked and told. See `FAMILIES`.

A question is a phase of a family, under the name of its bench function: `bench_forward` asks it of
linear layers, `bench_attention_forward` of attention.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from blockshock.phases.attention import case as attention_case
from blockshock.phases.attention import problem as attention_problem
from blockshock.phases.attention import steps as attention_steps
from blockshock.phases.linear import case, problem, steps, training
from blockshock.phases.linear import figures as linear_figures


@dataclass(frozen=True)
class Family:
    """The parts of the laboratory that a family brings.

    case: the class of its cases. prefix: of its questions, before the phase. phases: by name a
    function of (case, built, problem) that returns an `Experiment`. problem: (case, device) -> data
    and truth of a point. build: (case, problem) -> what is measured. changed: of that, the tensors
    which steps change, and which must stay finite. figures: (case, built, problem, experiment,
    ceilings) -> memory, floor, paths and more for the result. rates: (case, median seconds,
    outcome). usuals: (case) -> more for the result. check_all: raises ValueError or ImportError for
    cases whose data cannot be made. ranks: the only number it is measured with, or None.
    """

    case: type
    prefix: str
    phases: dict[str, Callable]
    problem: Callable
    build: Callable
    changed: Callable[[object], Iterable[torch.Tensor]]
    figures: Callable
    rates: Callable
    usuals: Callable
    check_all: Callable
    ranks: int | None = None


def family(case) -> Family:
    """The family of a case."""
    return FAMILIES[case.family]


def questions() -> dict[str, tuple[Family, str]]:
    """The name of a bench function, without "bench_" -> the family and the phase it asks about."""
    return {f.prefix + phase: (f, phase) for f in FAMILIES.values() for phase in f.phases}


FAMILIES = {
    "linear": Family(
        case=case.Case,
        prefix="",
        phases={
            "correctness": steps.correctness,
            "forward": steps.forward,
            "backward": steps.backward,
            "training": training.training,
            "drift": steps.drift,
        },
        problem=problem.Problem,
        build=linear_figures.build,
        changed=lambda layer: layer.parameters(),
        figures=linear_figures.figures,
        rates=linear_figures.rates,
        usuals=linear_figures.usuals,
        check_all=linear_figures.check_all,
    ),
    "attention": Family(
        case=attention_case.AttentionCase,
        prefix="attention_",
        phases=attention_steps.PHASES,
        problem=attention_problem.AttentionProblem,
        build=attention_steps.build,
        changed=lambda method: (),
        figures=attention_steps.figures,
        rates=attention_steps.rates,
        usuals=lambda case: {"usual": {}},
        check_all=lambda cases: None,
        ranks=1,
    ),
}
