"""The parts that a family gives to the laboratory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from blockshock.phases import axes
from blockshock.phases.case import Case


@dataclass(frozen=True)
class Family:
    """How the cases of a family are made, run, checked and told.

    case: the class of its cases. phases: by name a function of (case, built, problem) that returns
    an `Experiment`; the first line of its docstring says what one sample is. problem: (case,
    device) -> data and truth of a point. build: (case, problem) -> what is measured. figures:
    (case, built, problem, experiment, ceilings) -> memory, floor, paths and more for the result.
    rates: (case, median seconds, outcome).

    expand: (case class, listed axes, phase, ranks) -> cases. changed: of what was built, the
    tensors which steps change, and which must stay finite. usuals: (case) -> more for the result.
    check_all: raises ValueError or ImportError for cases whose data cannot be made. learn: is given
    (case, samples, extra_info) of all that was measured side by side, after each point, and what
    runs a function in all ranks. ranks: the only number of ranks it is measured with, or None.
    timings: by phase, the modes of `measure.clock` that GPUs can be timed in, the usual one first;
    a phase that is not named has all of them. benches: names of bench files, bench_<name>.py, that
    ask it beside that of its own name.
    """

    case: type[Case]
    phases: dict[str, Callable]
    problem: Callable
    build: Callable
    figures: Callable
    rates: Callable
    expand: Callable = axes.combine
    changed: Callable[[object], Iterable[torch.Tensor]] = lambda built: ()
    usuals: Callable[[Case], dict] = lambda case: {"usual": {}}
    check_all: Callable[[list[Case]], None] = lambda cases: None
    learn: Callable[[list[tuple[Case, list[float], dict]], Callable], None] | None = None
    ranks: int | None = None
    timings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    benches: tuple[str, ...] = ()
