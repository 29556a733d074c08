"""The Triton kernels behind `blockshock.kernels.block_lists`.

A mask of at most SMALL tiles takes one launch, whose programs each read all of it: a launch costs
2 us in a graph (H200), as much as the work. A larger one takes two, whose programs own a line each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALL = 1 << 14  # sizes rounded up to powers of two; a program has registers for no more


@triton.jit
def _count_and_fill(
    mask,
    others_r,
    turns_r,
    others_c,
    turns_c,
    numbers,
    lines,
    R,
    C,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A program owns a row and a column, and counts what it needs of the others itself."""
    line = tl.program_id(0)
    r, c = tl.arange(0, TALL), tl.arange(0, WIDE)
    there = (r < R)[:, None] & (c < C)[None, :]
    tiles = tl.load(mask + r[:, None] * C + c[None, :], there, 0).to(tl.int32)
    of_rows = tl.sum(tiles, 1)
    if line < R:
        row = tl.load(mask + line * C + c, c < C, 0).to(tl.int32)
        in_rows = _turn(of_rows, line, r, R, turns_r) + tl.cumsum(row, 0) - row
        tl.store(others_r + in_rows, c, row != 0)
        tl.store(lines + in_rows, tl.zeros_like(c) + line, row != 0)
    if line < C:
        column = tl.load(mask + r * C + line, r < R, 0).to(tl.int32)
        of_columns = tl.sum(tiles, 0)
        in_columns = _turn(of_columns, line, c, C, turns_c) + tl.cumsum(column, 0) - column
        left = tl.sum(tl.where((c < line)[None, :], tiles, 0), 1)
        tl.store(others_c + in_columns, r, column != 0)
        tl.store(numbers + in_columns, tl.cumsum(of_rows, 0) - of_rows + left, column != 0)


@triton.jit
def _count(mask, counts, before, R, C, WIDE: tl.constexpr):
    """counts [R + C] of the rows and the columns; before [R, C]: in its row, left of a tile."""
    line = tl.program_id(0)
    at = tl.arange(0, WIDE)
    if line < R:
        row = tl.load(mask + line * C + at, at < C, 0).to(tl.int32)
        tl.store(before + line * C + at, tl.cumsum(row, 0) - row, at < C)
        tl.store(counts + line, tl.sum(row, 0))
    else:
        column = tl.load(mask + at * C + (line - R), at < R, 0).to(tl.int32)
        tl.store(counts + line, tl.sum(column, 0))


@triton.jit
def _fill(
    mask,
    counts,
    before,
    others_r,
    turns_r,
    others_c,
    turns_c,
    numbers,
    lines,
    R,
    C,
    WIDE: tl.constexpr,
):
    line = tl.program_id(0)
    at = tl.arange(0, WIDE)
    of_rows = tl.load(counts + at, at < R, 0)
    if line < R:
        start = _turn(of_rows, line, at, R, turns_r)
        kept = tl.load(mask + line * C + at, at < C, 0) != 0
        place = start + tl.load(before + line * C + at, kept, 0)
        tl.store(others_r + place, at, kept)
        tl.store(lines + place, tl.zeros_like(at) + line, kept)
    else:
        line -= R
        of_columns = tl.load(counts + R + at, at < C, 0)
        start = _turn(of_columns, line, at, C, turns_c)
        column = tl.load(mask + at * C + line, at < R, 0).to(tl.int32)
        place = start + tl.cumsum(column, 0) - column
        number = tl.cumsum(of_rows, 0) - of_rows + tl.load(before + at * C + line, column != 0, 0)
        tl.store(others_c + place, at, column != 0)
        tl.store(numbers + place, number, column != 0)


@triton.jit
def _turn(counts, line, at, lines, turns):
    """Writes the turn of a line; returns where its entries begin."""
    own = tl.sum(tl.where(at == line, counts, 0), 0)
    start = tl.sum(tl.where(at < line, counts, 0), 0)
    earlier = (at < lines) & ((counts > own) | ((counts == own) & (at < line)))
    turn = turns + 3 * tl.sum(earlier.to(tl.int32), 0)
    tl.store(turn, line)
    tl.store(turn + 1, start)
    tl.store(turn + 2, start + own)
    return start


def fill(mask: Tensor, made: list[Tensor]) -> None:
    """Writes the tensors of `block_lists.Lists` for a mask bool [R, C]."""
    R, C = mask.shape
    mask = mask.contiguous().view(torch.uint8)
    tall, wide = triton.next_power_of_2(R), triton.next_power_of_2(C)
    with torch.cuda.device_of(mask):
        if tall * wide <= SMALL:
            warps = max(4, tall * wide // 512)
            _count_and_fill[(max(R, C),)](mask, *made, R, C, TALL=tall, WIDE=wide, num_warps=warps)
        else:
            counts, before = (mask.new_empty(size, dtype=torch.int32) for size in (R + C, R * C))
            most = max(tall, wide)
            _count[(R + C,)](mask, counts, before, R, C, WIDE=most)
            _fill[(R + C,)](mask, counts, before, *made, R, C, WIDE=most)
