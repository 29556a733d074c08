"""What a sparse layer keeps, as extra state of its state_dict: a line of JSON, then its bytes.

It is uint8, so that what copies tensors copies it, and it is no buffer, so that what averages or
casts buffers cannot change it. A digest tells whether something did.
"""

import json
import zlib

import torch
from torch import Tensor


def save(kept: Tensor, about: dict) -> Tensor:
    """kept: uint8, which entries are kept. about: what the layer is. Returns uint8, 1-D."""
    told = about | {"digest": _digest(kept)}
    line = torch.frombuffer(bytearray(json.dumps(told).encode() + b"\n"), dtype=torch.uint8)
    return torch.cat([line.to(kept.device), kept.flatten()])


def load(state: Tensor | None, shape: tuple[int, ...], about: dict) -> Tensor:
    """What `save` was given, uint8 of this shape on the CPU.

    Raises:
        ValueError: another thing was saved, it is about another layer, or was changed since.
    """
    try:
        line, _, rest = state.cpu().numpy().tobytes().partition(b"\n")
        told = json.loads(line)
        digest = told.pop("digest")
    except (ValueError, AttributeError, TypeError, KeyError):
        raise ValueError(
            "the state does not say which entries it holds, as a dense layer's; load that before "
            "the layer is made sparse"
        ) from None
    if told != about:
        raise ValueError(f"the state is of {told}, the layer is {about}; make the layer like it")
    kept = torch.frombuffer(bytearray(rest) or bytearray(1), dtype=torch.uint8)
    if kept.numel() != torch.Size(shape).numel() or digest != _digest(kept):
        raise ValueError("the state's mask was changed after it was saved; save it again")
    return kept.view(shape)


def _digest(kept: Tensor) -> int:
    return zlib.crc32(kept.cpu().contiguous().numpy().tobytes())
