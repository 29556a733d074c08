"""What the Triton kernels of attention share: which tiles they walk, and which scores count there.

A program owns M queries (or N keys) and walks the tiles of the other side that it meets in two
runs: the full ones, and the partial ones, whose scores are masked. LISTED: both runs stand in
memory (`attention.blocks`); otherwise they follow from the sizes and KEEP. Full tiles of a list
that follow each other (CONSECUTIVE) are counted, not looked up: loads need not wait for the list's.

KEEP says which scores of a partial tile count:

    "ragged"    keys before Tk
    "causal"    keys up to the query's place, before Tk
    "interval"  keys from low[query] to high[query]
    "bits"      those whose bit is set in the tile's own mask
"""

import triton
import triton.language as tl

# Numbers whose value no kernel is compiled anew for.
ANY = ("heads", "tiles", "Tk", "batch_stride", "head_stride", "seed", "threshold")

# Arguments stand in groups.
# fmt: off


@triton.jit
def listed(turns, plane, tiles, turn):
    """Of a program's turn: its tile, from and to of its full tiles, and of its partial ones."""
    at = turns + (plane * tiles + turn) * 5
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


@triton.jit
def key_runs(
    turns, plane, tiles, turn, Tq, Tk, M: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr,
    LISTED: tl.constexpr,
):
    """The same for a program that owns queries, listed or not."""
    if LISTED:
        tile, begin, end, first, last = listed(turns, plane, tiles, turn)
    elif KEEP == "causal":  # the longest first
        tile = tiles - 1 - turn
        begin = tile * 0
        end = tl.minimum(tile * M + 1, Tk) // N
        first = end
        last = tl.cdiv(tl.minimum(tl.minimum((tile + 1) * M, Tq), Tk), N)
    else:
        tile = turn
        begin = tile * 0
        end = begin + Tk // N
        first = end
        last = begin + tl.cdiv(Tk, N)
    return tile, begin, end, first, last


@triton.jit
def interval(queries, low, high, Tq, Tk, KEEP: tl.constexpr):
    """From which key to which the queries attend; not used under "bits"."""
    from_key = tl.zeros_like(queries)
    to_key = from_key + Tk
    if KEEP == "interval":
        from_key = tl.load(low + queries, queries < Tq, 0)
        to_key = tl.load(high + queries, queries < Tq, 0)
    elif KEEP == "causal":
        to_key = tl.minimum(queries + 1, Tk)
    return from_key, to_key


@triton.jit
def counts(
    keys, from_key, to_key, bits, mask, row, column, M: tl.constexpr, N: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Whether scores count, as the arguments broadcast. row, column: places in a tile [M, N]."""
    if KEEP == "bits":
        words = tl.load(bits + mask.to(tl.int64) * (M * N // 32) + row * (N // 32) + column // 32)
        return ((words >> (column % 32)) & 1) != 0
    elif KEEP == "interval":
        return (keys >= from_key) & (keys < to_key)
    else:
        return keys < to_key


@triton.jit
def kept_factor(seed, threshold, factor, row, queries, keys):
    """Dropout's factor of each score, 0 or `factor`; see `dropout`."""
    zero = tl.zeros_like(queries + keys)
    random, _, _, _ = tl.philox(
        seed, (keys + zero).to(tl.uint32), (queries + zero).to(tl.uint32),
        (row + zero).to(tl.uint32), zero.to(tl.uint32),
    )
    return tl.where(random.to(tl.int64) >= threshold, factor, 0.0)
