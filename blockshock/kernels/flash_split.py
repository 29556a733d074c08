"""What pieces of long lists give, put together: kernels behind `flash_forward`, `flash_backward`.

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
