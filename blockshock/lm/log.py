"""What a run shows and writes: a progress bar, a CSV, and TensorBoard or wandb where asked.

`<run>/log.csv` has a row every `log.every` steps: `loss` and `tokens_per_s` are means over the
steps since the row before, the others are of the row's step. `val_loss` stands where it was
measured. tokens: read by all ranks. seconds: of training, over all parts of a resumed run.
memory_mib: the most that rank 0 held: of GPU memory, or of the process on a CPU.

MFU is 6 P + 12 depth width T FLOPs a token (`transformer.counts`) times tokens/s over the peak of
all GPUs: `log.peak_tflops`, or the data sheet's dense bf16 rate. Elsewhere it is empty.
"""

import contextlib
import csv
import resource
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from blockshock.lm import config as settings
from blockshock.lm.config import Config, Refused
from blockshock.lm.files import written_whole
from blockshock.measure import datasheet

COLUMNS = [
    *("step", "tokens", "loss", "val_loss", "lr", "grad_norm"),
    *("tokens_per_s", "mfu", "seconds", "memory_mib"),
]


def peak_flops(config: Config, device: torch.device) -> float | None:
    """FLOP/s of one device that MFU is a share of, or None where nobody said."""
    if config.log.peak_tflops:
        return config.log.peak_tflops * 1e12
    return datasheet.bf16_flops(device)


def memory_mib(device: torch.device) -> float:
    """The most memory that this rank held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # kB on Linux


class Log:
    """The log of rank 0. begun: the step that the run goes on from.

    Raises:
        Refused: TensorBoard or wandb is asked for and not installed.
    """

    def __init__(self, config: Config, begun: int):
        self.path = Path(config.run) / "log.csv"
        self._more = _writers(config, begun)
        _cut(self.path, begun)
        self._file = self.path.open("a", newline="")
        self._csv = csv.DictWriter(self._file, COLUMNS)
        self._bar = tqdm(total=config.train.steps, initial=begun, unit="step", disable=None)

    def row(self, **values: Any) -> None:
        """One row, by the names in COLUMNS; None is written as nothing."""
        try:
            self._csv.writerow({name: _short(values.get(name)) for name in COLUMNS})
            self._file.flush()
        except OSError as error:
            raise Refused(f"{self.path} cannot be written: {error.strerror}; make room") from error
        for write in self._more:
            write(values)
        shown = {"loss": f"{values['loss']:.4f}", "tokens/s": f"{values['tokens_per_s']:,.0f}"}
        if values.get("val_loss") is not None:
            shown["val"] = f"{values['val_loss']:.4f}"
        if values.get("mfu") is not None:
            shown["MFU"] = f"{values['mfu']:.3f}"
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


def _cut(path: Path, begun: int) -> None:
    """Leaves the header and the whole rows up to step `begun`; a resumed run writes the later ones.

    A full disk can leave a part of the last row, whose step may have lost digits.
    """
    rows = []
    if begun and path.is_file():
        with path.open(newline="") as file:
            found = (row for row in csv.DictReader(file) if row[COLUMNS[-1]])
            rows = [row for row in found if int(row["step"]) <= begun]
    lines = [",".join(COLUMNS), *(",".join(row[name] or "" for name in COLUMNS) for row in rows)]
    with written_whole(path) as out:
        out.write("".join(f"{line}\r\n" for line in lines).encode())


def _writers(config: Config, begun: int) -> list:
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
