"""The Triton kernels behind `blockshock.kernels.block_lists`. A program owns a line of the mask."""

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    counts, before = (mask.new_empty(size, dtype=torch.int32) for size in (R + C, R * C))
    wide = triton.next_power_of_2(max(R, C))
    with torch.cuda.device_of(mask):
        _count[(R + C,)](mask, counts, before, R, C, WIDE=wide)
        _fill[(R + C,)](mask, counts, before, *made, R, C, WIDE=wide)
