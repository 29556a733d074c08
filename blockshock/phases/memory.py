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


def held(problem) -> int:
    """Bytes of a problem's tensors, truths computed so far among them: no method's memory."""
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in _tensors(problem)}
    return sum(storages.values())


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


def _tensors(value):
    """The tensors in a value: itself, in its items, in its attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
