"""The Triton kernels behind `blockshock.kernels.columns`: a group of four 16-bit entries is a word.

A program owns a block of groups of one row; wide rows may be strided.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = (
    1024  # 256 to 2048 within 2 % at 4096 × 8192 and 4096 × 16384 (H200): 0.92 of copy bandwidth
)


@triton.jit
def _take(wide, out, groups, pitch, I0: tl.constexpr, I1: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(wide + row * pitch + group, group < groups, 0)
    pair = ((word >> (16 * I0)) & 0xFFFF) | (((word >> (16 * I1)) & 0xFFFF) << 16)
    tl.store(out + row * groups + group, pair.to(tl.int32), group < groups)


@triton.jit
def _join(
    a,
    b,
    wide,
    groups,
    pitch,
    I0: tl.constexpr,
    I1: tl.constexpr,
    J0: tl.constexpr,
    J1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(a + row * groups + group, group < groups, 0).to(tl.int64)
    second = tl.load(b + row * groups + group, group < groups, 0).to(tl.int64)
    word = ((first & 0xFFFF) << (16 * I0)) | (((first >> 16) & 0xFFFF) << (16 * I1))
    word |= ((second & 0xFFFF) << (16 * J0)) | (((second >> 16) & 0xFFFF) << (16 * J1))
    tl.store(wide + row * pitch + group, word, group < groups)


@triton.jit
def _quads(wide, out, groups, pitch, plane, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(wide + row * pitch + group, group < groups, 0)
    for r in tl.static_range(4):
        entry = ((word >> (16 * r)) & 0xFFFF).to(tl.int16)
        tl.store(out + r * plane + row * groups + group, entry, group < groups)


def _words(wide: Tensor) -> tuple[Tensor, int, int]:
    """A wide tensor [B, 4 groups] as words, its groups and its pitch in words."""
    return wide.view(torch.int64), wide.shape[1] // 4, wide.stride(0) // 4


def take(x: Tensor, places: tuple[int, int], out: Tensor) -> None:
    """x [B, K] 16-bit, out [B, K/2] contiguous."""
    words, groups, pitch = _words(x)
    grid = (x.shape[0], triton.cdiv(groups, BLOCK))
    with torch.cuda.device_of(out):
        _take[grid](words, out.view(torch.int32), groups, pitch, *places, BLOCK=BLOCK)


def join(a: Tensor, b: Tensor, places: tuple[int, int], out: Tensor) -> None:
    """a, b [B, K/2] contiguous 16-bit, out [B, K]."""
    words, groups, pitch = _words(out)
    grid = (out.shape[0], triton.cdiv(groups, BLOCK))
    kept = (*places, *(place for place in range(4) if place not in places))
    parts = a.view(torch.int32), b.view(torch.int32)
    with torch.cuda.device_of(out):
        _join[grid](*parts, words, groups, pitch, *kept, BLOCK=BLOCK)


def quads(y: Tensor, out: Tensor) -> None:
    """y [B, N] 16-bit, out [4, B, N/4] contiguous."""
    words, groups, pitch = _words(y)
    grid = (y.shape[0], triton.cdiv(groups, BLOCK))
    with torch.cuda.device_of(out):
        _quads[grid](words, out.view(torch.int16), groups, pitch, out.stride(0), BLOCK=BLOCK)
