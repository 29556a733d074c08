"""What a language-model run shows and writes.

`<run>/log.csv` has a row every `log.every` steps: `loss` and `tokens_per_s` are means over the
steps since the row before, the others are of the row's step. `val_loss` stands where it was
measured. tokens: read by all ranks. seconds: of training, over all parts of a resumed run.
memory_mib: the most that rank 0 held: of GPU memory, or of the process on a CPU.

MFU is 6 P + 12 depth width T FLOPs a token (`transformer.counts`) times tokens/s over the peak of
all GPUs: `log.peak_tflops`, or the data sheet's dense bf16 rate. Elsewhere it is empty.
"""

import torch

from blockshock.lm.config import Config
from blockshock.measure import datasheet
from blockshock.runs.log import Log

COLUMNS = [
    *("step", "tokens", "loss", "val_loss", "lr", "grad_norm"),
    *("tokens_per_s", "mfu", "seconds", "memory_mib"),
]
SHOWN = {
    "loss": ("loss", ".4f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "val_loss": ("val", ".4f"),
    "mfu": ("MFU", ".3f"),
}


def peak_flops(config: Config, device: torch.device) -> float | None:
    """FLOP/s of one device that MFU is a share of, or None where nobody said."""
    if config.log.peak_tflops:
        return config.log.peak_tflops * 1e12
    return datasheet.bf16_flops(device)


def open_log(config: Config, begun: int) -> Log:
    """The log of rank 0. begun: the step that the run goes on from. Raises Refused as `Log`."""
    return Log(config, COLUMNS, SHOWN, begun)
