"""Bytes on a rank's device: what a layer takes while it is built and while it works, what is left.

On the CPU nothing says how much is allocated: peaks are None there, and there is always room.
"""

import gc
import math
from collections.abc import Callable

import torch


def allocated(device: torch.device) -> int:
    """Bytes of all tensors."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reserved(device: torch.device) -> int:
    """Bytes that the process holds: since the last `release`, the most that tensors took."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def release(device: torch.device) -> None:
    """Gives back what no tensor uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def room(device: torch.device) -> float:
    """Bytes that are free, after a `release`."""
    release(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def peak(run: Callable, device: torch.device, over: int) -> tuple[object, int | None]:
    """(what `run` returns, bytes allocated at most meanwhile less `over`)."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - over
