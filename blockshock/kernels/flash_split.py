"""What pieces of long lists, or of many keys, give, put together.

Kernels behind `flash_forward` and `flash_backward`.

    out = sum_s 2^(level_s - level) out_s,   level = log2 sum_s 2^level_s          row by row
    dQ, dK, dV = the sums of their parts

A split is (tile, from_slot, to_slot), int32 (`attention.turns`); parts are float32
[planes * slots, ROWS, D], levels [planes * slots, ROWS], planes those of the grid. Parts are summed
in the order of their slots, so two runs give the same bits. Splitting keys: Dao et al. 2023,
"Flash-Decoding".
"""

import triton
import triton.language as tl

from blockshock.kernels.flash_forward import LN2, finished

# Arguments stand in groups.
# fmt: off


@triton.jit(do_not_specialize=("splits", "slots", "heads"))
def merge(
    parts, levels, split, o, lse, splits, slots, heads, Tq, ROWS: tl.constexpr, D: tl.constexpr,
):
    """out and lse of a split tile of queries. Grid: a program for each split of each head."""
    row = tl.program_id(0) // splits
    tile, first, last = _of(split, tl.program_id(0) % splits)
    total = tl.zeros((ROWS, D), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    for slot in range(first, last):
        at = (row.to(tl.int64) * slots + slot) * ROWS + tl.arange(0, ROWS)
        level = tl.load(levels + at)
        part = tl.load(parts + at[:, None] * D + tl.arange(0, D)[None, :])
        larger = tl.maximum(most, level)
        safe = tl.where(larger == float("-inf"), 0.0, larger)
        shrink, own = tl.exp2(most - safe), tl.exp2(level - safe)
        total = total * shrink[:, None] + part * own[:, None]
        weight = weight * shrink + own
        most = larger
    out, of_rows = finished(total, weight, most)
    o.store(
        [row // heads, row % heads, tile * ROWS, 0], out.to(o.dtype).reshape(1, 1, ROWS, D)
    )
    queries = tile * ROWS + tl.arange(0, ROWS)
    tl.store(lse + row.to(tl.int64) * Tq + queries, of_rows * LN2, queries < Tq)


@triton.jit(do_not_specialize=("pieces", "tiles", "Tq"))
def merge_pieces(
    parts, levels, o, lse, pieces, tiles, Tq, M: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, MOST: tl.constexpr, STEP: tl.constexpr,
):
    """out [B, H, Tq, WIDTH], contiguous, and lse of a query. Grid: a program for each.

    Slots are those of pieces of the same tile, tile after tile: `flash_walk.of_queries`.
    """
    row, query = tl.program_id(0) // Tq, tl.program_id(0) % Tq
    first = (row.to(tl.int64) * tiles + query // M) * pieces * M + query % M
    number = tl.arange(0, MOST)
    level = tl.load(levels + first + number * M, number < pieces, float("-inf"))
    most = tl.max(level, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    weight = tl.sum(tl.exp2(level - most), 0)
    total = tl.zeros((D,), tl.float32)
    place = tl.arange(0, D)
    for begin in range(0, pieces, STEP):
        some = begin + tl.arange(0, STEP)
        inside = some < pieces
        at = first + some * M
        own = tl.exp2(tl.load(levels + at, inside, float("-inf")) - most)
        part = tl.load(parts + at[:, None] * D + place[None, :], inside[:, None], 0.0)
        total += tl.sum(part * own[:, None], 0)
    out = total / tl.where(weight == 0.0, 1.0, weight)
    at = tl.program_id(0).to(tl.int64)
    tl.store(o + at * WIDTH + place, out.to(o.dtype.element_ty), place < WIDTH)
    of_row = tl.where(weight == 0.0, float("-inf"), most + tl.log2(weight))
    tl.store(lse + at, of_row * LN2)


@triton.jit(do_not_specialize=("splits", "slots", "heads"))
def add(
    parts, split, made, splits, slots, heads, scale, ROWS: tl.constexpr, D: tl.constexpr,
):
    """A gradient of a split tile. Grid: a program for each split of each head."""
    row = tl.program_id(0) // splits
    tile, first, last = _of(split, tl.program_id(0) % splits)
    total = tl.zeros((ROWS, D), tl.float32)
    for slot in range(first, last):
        at = (row.to(tl.int64) * slots + slot) * ROWS + tl.arange(0, ROWS)
        total += tl.load(parts + at[:, None] * D + tl.arange(0, D)[None, :])
    made.store(
        [row // heads, row % heads, tile * ROWS, 0],
        (total * scale).to(made.dtype).reshape(1, 1, ROWS, D),
    )


@triton.jit
def _of(split, number):
    """Tile, and from and to of its slots."""
    at = split + number * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)
