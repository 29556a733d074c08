"""The loop of a training command: steps, and what comes every so many of them.

The host waits for the device only where a row is logged, something is evaluated or a checkpoint is
written. There a loss or a norm that is not finite ends the run, before anything is overwritten.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from blockshock.runs.files import alone
from blockshock.runs.ranks import Ranks, Stop
from blockshock.runs.settings import Refused


class Run(Protocol):
    """A training run on one rank. step: steps done."""

    step: int

    def take_step(self) -> None:
        """One step; `step` counts it."""

    def report(self, evaluating: bool) -> None:
        """A row of the log on the steps since `begin_window`; raises Refused if not finite."""

    def save(self) -> None:
        """Writes a checkpoint."""

    def begin_window(self) -> None:
        """The steps that the next row tells of begin here."""


class Every(Protocol):
    """What a config's section `train` says; 0 is only at the end."""

    steps: int
    checkpoint_every: int
    evaluate_every: int


def loop(run: Run, ranks: Ranks, train: Every, log_every: int) -> bool:
    """Steps until the last one (True) or a signal (False); both leave a checkpoint."""
    with Stop(ranks) as stop:
        while run.step < train.steps:
            stop.ask()
            run.take_step()
            last, stopping = run.step == train.steps, stop.decided()
            saving = last or stopping or _due(run.step, train.checkpoint_every)
            evaluating = last or _due(run.step, train.evaluate_every)
            if saving or evaluating or _due(run.step, log_every):
                run.report(evaluating)
                if saving:
                    run.save()
                run.begin_window()
            if stopping:
                break
    return run.step == train.steps


@contextmanager
def only_here(folder: str, ranks: Ranks) -> Iterator[None]:
    """Holds the run's folder for these ranks. Raises Refused where another process has it."""

    def busy() -> None:
        raise Refused(
            f"run = {folder}: another process is training there; wait for its end, or choose "
            "another folder (--set run=FOLDER)"
        )

    with ExitStack() as held:
        ranks.by_first(lambda: held.enter_context(alone(Path(folder), busy)))
        yield


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raises Refused where the loss or the gradient's norm is not a number."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Refused(
            f"step {step}: loss = {loss}, norm of the gradient = {norm}: the run diverged. A "
            "checkpoint that was written before is kept; lower train.lr, or raise train.warmup, "
            "and begin anew or --resume from it"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
