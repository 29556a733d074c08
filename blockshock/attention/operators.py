"""The launches of `kernels.flash` as operators of PyTorch: opaque to `torch.compile`, shapes known.

Outside a compiler the launches are called directly: an operator costs the host microseconds.
"""

import torch
from torch import Tensor

from blockshock.kernels import flash


@torch.library.custom_op("blockshock::flash_forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, shift: int | None
) -> tuple[Tensor, Tensor]:
    """`flash.forward` without lists."""
    return flash.forward(q, k, v, scale=scale, shift=shift)


@forward.register_fake
def _(q, k, v, *, scale, shift):
    return made_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("blockshock::flash_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    *,
    scale: float,
    shift: int | None,
    of_q: bool,
    of_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    made = flash.backward(
        *(q, k, v, out, lse, d_out), scale=scale, shift=shift, wanted=(of_q, of_k)
    )
    return tuple(q.new_empty(0) if x is None else x for x in made)  # it must return tensors


@_backward.register_fake
def _(q, k, v, out, lse, d_out, *, scale, shift, of_q, of_k):
    wanted = zip((q, k, v), (of_q, of_k, of_k), strict=True)
    return tuple(made_like(x) if asked else q.new_empty(0) for x, asked in wanted)


def backward(*tensors: Tensor, wanted: tuple[bool, bool], **options) -> tuple[Tensor | None, ...]:
    """`flash.backward` without lists."""
    made = _backward(*tensors, of_q=wanted[0], of_k=wanted[1], **options)
    asked = wanted[0], wanted[1], wanted[1]
    return tuple(x if one else None for x, one in zip(made, asked, strict=True))


def made_like(x: Tensor) -> Tensor:
    """What a launch returns for it: the same shape, contiguous."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
