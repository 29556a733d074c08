"""What a run shows and writes: a progress bar, a CSV, and TensorBoard or wandb where asked.

`<run>/log.csv` has a row every `log.every` steps. A resumed run writes the rows behind its
checkpoint again.
"""

import contextlib
import csv
import resource
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from blockshock.runs import settings
from blockshock.runs.files import written_whole
from blockshock.runs.settings import Refused


def memory_mib(device: torch.device) -> float:
    """The most memory that this rank held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # kB on Linux


class Log:
    """The log of rank 0. begun: the step that the run goes on from.

    config: with `run`, `train.steps`, `log.tensorboard` and `log.wandb`. columns: of the CSV, the
    first is `step`. shown: column -> (label, format) of what stands beside the bar.

    Raises:
        Refused: TensorBoard or wandb is asked for and not installed.
    """

    def __init__(
        self, config: Any, columns: list[str], shown: dict[str, tuple[str, str]], begun: int
    ):
        self.path, self.columns, self.shown = Path(config.run) / "log.csv", columns, shown
        self._more = _writers(config, begun)
        _cut(self.path, columns, begun)
        self._file = self.path.open("a", newline="")
        self._csv = csv.DictWriter(self._file, columns)
        self._bar = tqdm(total=config.train.steps, initial=begun, unit="step", disable=None)

    def row(self, **values: Any) -> None:
        """One row, by the columns' names; None is written as nothing."""
        try:
            self._csv.writerow({name: _short(values.get(name)) for name in self.columns})
            self._file.flush()
        except OSError as error:
            raise Refused(f"{self.path} cannot be written: {error.strerror}; make room") from error
        for write in self._more:
            write(values)
        found = {name: values.get(name) for name in self.shown}
        shown = {
            self.shown[name][0]: format(value, self.shown[name][1])
            for name, value in found.items()
            if value is not None
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(values["step"] - self._bar.n if not self._bar.disable else 0)
        if self._bar.disable:  # no terminal: a line a row
            words = " ".join(f"{name} {text}" for name, text in shown.items())
            self.tell(f"step {values['step']}: {words}")

    def tell(self, line: str) -> None:
        """A line of text, above the bar."""
        tqdm.write(line)

    def close(self) -> None:
        """Ends the bar and the files."""
        self._bar.close()
        with contextlib.suppress(OSError):  # a row that found no room has been refused
            self._file.close()
        for write in self._more:
            write(None)


def _short(value: Any) -> Any:
    """Floats with 9 digits: float32 values are told apart."""
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else value


def _cut(path: Path, columns: list[str], begun: int) -> None:
    """Leaves the header and the whole rows up to step `begun`; a resumed run writes the later ones.

    A full disk can leave a part of the last row, whose step may have lost digits.

    Raises:
        Refused: it is no log of this program; it is not overwritten.
    """
    rows = []
    if begun and path.is_file():
        try:
            with path.open(newline="") as file:
                found = (row for row in csv.DictReader(file) if row[columns[-1]])
                rows = [row for row in found if int(row["step"]) <= begun]
        except (KeyError, ValueError, csv.Error) as error:
            raise Refused(
                f"{path} is no log with the columns of this version; move it elsewhere, and the "
                "run goes on with a new one"
            ) from error
    lines = [",".join(columns), *(",".join(row[name] or "" for name in columns) for row in rows)]
    with written_whole(path) as out:
        out.write("".join(f"{line}\r\n" for line in lines).encode())


def _writers(config: Any, begun: int) -> list:
    """Functions that take the values of a row, and None at the end."""
    writers = []
    if config.log.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise Refused(
                "log.tensorboard = true: tensorboard is missing; pip install 'blockshock[log]'"
            ) from error
        # Rows beyond the checkpoint are written again: those that are there are not to be shown.
        board = SummaryWriter(config.run, purge_step=begun + 1 if begun else None)
        writers.append(lambda values: board.close() if values is None else _scalars(board, values))
    if config.log.wandb != "off":
        try:
            import wandb
        except ImportError as error:
            raise Refused(
                f"log.wandb = {config.log.wandb}: wandb is missing; pip install 'blockshock[log]'"
            ) from error
        run = wandb.init(
            project="blockshock",
            mode=config.log.wandb,
            dir=config.run,
            config=settings.to_dict(config),
        )
        writers.append(
            lambda values: run.finish() if values is None else run.log(values, step=values["step"])
        )
    return writers


def _scalars(board: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name != "step" and value is not None:
            board.add_scalar(name, value, values["step"])
