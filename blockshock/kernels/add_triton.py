"""The Triton kernel behind `blockshock.kernels.add`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 8


@triton.jit
def _add_in_order(
    p0, p1, p2, p3, p4, p5, p6, p7, out, count, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(p0 + at, inside).to(tl.float32)
    if PARTS > 1:
        total += tl.load(p1 + at, inside).to(tl.float32)
    if PARTS > 2:
        total += tl.load(p2 + at, inside).to(tl.float32)
    if PARTS > 3:
        total += tl.load(p3 + at, inside).to(tl.float32)
    if PARTS > 4:
        total += tl.load(p4 + at, inside).to(tl.float32)
    if PARTS > 5:
        total += tl.load(p5 + at, inside).to(tl.float32)
    if PARTS > 6:
        total += tl.load(p6 + at, inside).to(tl.float32)
    if PARTS > 7:
        total += tl.load(p7 + at, inside).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


def add_in_order(parts: list[Tensor], out: Tensor) -> None:
    """Contiguous tensors of one shape; at most MOST parts."""
    if len(parts) > MOST:
        raise ValueError(f"{len(parts)} parts: the kernel adds at most {MOST}")
    pointers = parts + parts[:1] * (MOST - len(parts))
    grid = (triton.cdiv(out.numel(), 2048),)
    with torch.cuda.device_of(out):
        _add_in_order[grid](*pointers, out, out.numel(), PARTS=len(parts), BLOCK=2048)
