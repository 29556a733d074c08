"""Forward passes in another precision, and copies to the device."""

import contextlib

import torch


def autocast(kind: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The context of forward passes: "bf16" products under float32 weights, or "none"."""
    if kind == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that the host does not wait for."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
