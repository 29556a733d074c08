"""What a phase of any family is once it is ready: a step to time, and a check to pass first."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from blockshock.measure.errors import Figure


@dataclass
class Experiment:
    """A phase, ready to run: one step, and one check.

    step: one timed call. check: the error figures by name, from a fresh run.
    products: the phase whose floor applies. trained_bytes: parameters an optimizer updates.
    extra: more for the result file, filled by the check. replicated: by name, the results that
    every rank must hold in the same bits.
    """

    step: Callable[[], None]
    check: Callable[[], dict[str, Figure]]
    products: str
    trained_bytes: int = 0
    steps: int = 1
    extra: dict = field(default_factory=dict)
    replicated: dict[str, Tensor] = field(default_factory=dict)
