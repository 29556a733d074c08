"""The Triton kernels behind `blockshock.kernels.pack`. Bound by memory: each byte moves once.

Shapes: values [n, k/2], codes [n, k/4], dense [n, k]; a program owns a block of rows × groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gather_kept(dense, codes, out, n, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    wide = tl.program_id(1) * GROUPS * 4 + tl.arange(0, GROUPS * 4)[None, :]
    pair = tl.program_id(1) * GROUPS * 2 + tl.arange(0, GROUPS * 2)[None, :]
    block = tl.load(dense + row * groups * 4 + wide, (row < n) & (wide < groups * 4), 0.0)
    code = tl.load(codes + row * groups + group, (row < n) & (group < groups), 4)
    even, odd = tl.split(tl.reshape(block, (ROWS, GROUPS, 2, 2)))  # places 0, 2 and 1, 3
    d0, d2 = tl.split(even)
    d1, d3 = tl.split(odd)
    i0 = code & 3
    i1 = code >> 2
    v0 = tl.where(i0 == 0, d0, tl.where(i0 == 1, d1, d2))  # i0 < i1, so i0 is never 3
    v1 = tl.where(i1 == 1, d1, tl.where(i1 == 2, d2, d3))  # and i1 never 0
    mask = (row < n) & (pair < groups * 2)
    tl.store(out + row * groups * 2 + pair, tl.interleave(v0, v1), mask)


@triton.jit
def _expand(values, codes, out, n, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    wide = tl.program_id(1) * GROUPS * 4 + tl.arange(0, GROUPS * 4)[None, :]
    pair = tl.program_id(1) * GROUPS * 2 + tl.arange(0, GROUPS * 2)[None, :]
    block = tl.load(values + row * groups * 2 + pair, (row < n) & (pair < groups * 2), 0.0)
    code = tl.load(codes + row * groups + group, (row < n) & (group < groups), 4)
    v0, v1 = tl.split(tl.reshape(block, (ROWS, GROUPS, 2)))
    i0 = code & 3
    i1 = code >> 2
    zero = tl.zeros_like(v0)
    d0 = tl.where(i0 == 0, v0, zero)
    d1 = tl.where(i0 == 1, v0, tl.where(i1 == 1, v1, zero))
    d2 = tl.where(i0 == 2, v0, tl.where(i1 == 2, v1, zero))
    d3 = tl.where(i1 == 3, v1, zero)
    dense = tl.interleave(tl.interleave(d0, d2), tl.interleave(d1, d3))
    tl.store(out + row * groups * 4 + wide, dense, (row < n) & (wide < groups * 4))


@triton.jit
def _row_of_tiles(
    values, codes, tile, r, group, pair, tiles, groups, TI: tl.constexpr, TJ: tl.constexpr
):
    """Row r of each 4×4 tile: its two values and its code, each [TI, TJ]."""
    row = (tile * 4 + r).to(tl.int64)[:, None]
    inside = tile[:, None] < tiles
    block = tl.load(values + row * groups * 2 + pair, inside & (pair < groups * 2), 0.0)
    code = tl.load(codes + row * groups + group, inside & (group < groups), 4)
    v0, v1 = tl.split(tl.reshape(block, (TI, TJ, 2)))
    return v0, v1, code


@triton.jit
def _in_column(v0, v1, code, k):
    """Whether a row keeps its place k, and the value there if it does."""
    low = (code & 3) == k
    return low | ((code >> 2) == k), tl.where(low, v0, v1)


@triton.jit
def _transpose_kept(values, codes, out, tiles, groups, TI: tl.constexpr, TJ: tl.constexpr):
    tile = tl.program_id(0) * TI + tl.arange(0, TI)
    group = tl.program_id(1) * TJ + tl.arange(0, TJ)[None, :]
    pair = tl.program_id(1) * TJ * 2 + tl.arange(0, TJ * 2)[None, :]
    slot = tl.program_id(0) * TI * 2 + tl.arange(0, TI * 2)[None, :]
    k_row = (tl.program_id(1) * TJ + tl.arange(0, TJ)).to(tl.int64)[:, None]
    a0, a1, a = _row_of_tiles(values, codes, tile, 0, group, pair, tiles, groups, TI, TJ)
    b0, b1, b = _row_of_tiles(values, codes, tile, 1, group, pair, tiles, groups, TI, TJ)
    c0, c1, c = _row_of_tiles(values, codes, tile, 2, group, pair, tiles, groups, TI, TJ)
    d0, d1, d = _row_of_tiles(values, codes, tile, 3, group, pair, tiles, groups, TI, TJ)
    for k in tl.static_range(4):
        # Two of the rows a to d keep column k: the first is not d, the last is not a.
        in_a, va = _in_column(a0, a1, a, k)
        in_b, vb = _in_column(b0, b1, b, k)
        in_c, vc = _in_column(c0, c1, c, k)
        in_d, vd = _in_column(d0, d1, d, k)
        first = tl.where(in_a, va, tl.where(in_b, vb, vc))
        last = tl.where(in_d, vd, tl.where(in_c, vc, vb))
        columns = tl.interleave(tl.trans(first), tl.trans(last))  # [TJ, 2 TI]
        mask = (k_row < groups) & (slot < tiles * 2)
        tl.store(out + (k_row * 4 + k) * tiles * 2 + slot, columns, mask)


def _grid(n: int, groups: int, rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(n, rows), triton.cdiv(groups, columns)


def gather_kept(dense: Tensor, codes: Tensor, out: Tensor) -> None:
    """dense [n, k], codes [n, k/4], out [n, k/2]; all contiguous."""
    n, groups = codes.shape
    grid = _grid(n, groups, 4, 256)
    with torch.cuda.device_of(out):
        _gather_kept[grid](dense, codes, out, n, groups, ROWS=4, GROUPS=256)


def expand(values: Tensor, codes: Tensor, out: Tensor) -> None:
    """values [n, k/2], codes [n, k/4], out [n, k]; all contiguous."""
    n, groups = codes.shape
    grid = _grid(n, groups, 4, 256)
    with torch.cuda.device_of(out):
        _expand[grid](values, codes, out, n, groups, ROWS=4, GROUPS=256)


def transpose_kept(values: Tensor, codes: Tensor, out: Tensor) -> None:
    """values [n, k/2] and codes [n, k/4] of a tile mask; out [k, n/2]; all contiguous."""
    n, groups = codes.shape
    tiles = n // 4
    # The best of TI 16 to 128, TJ 16 to 64 and 4 or 8 warps: 0.70 of copy bandwidth at N = 8192 and
    # 0.71 at 16384 (H200).
    grid = _grid(tiles, groups, 16, 16)
    with torch.cuda.device_of(out):
        _transpose_kept[grid](values, codes, out, tiles, groups, TI=16, TJ=16, num_warps=8)
