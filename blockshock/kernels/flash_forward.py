"""FlashAttention's forward as a Triton kernel, dense, causal or over lists of tiles.

    S = scale · Q Kᵀ,   P = exp(S − m),   O = P V / Σ P,   lse = m + ln Σ P      row by row

Dao 2023, "FlashAttention-2", arXiv:2307.08691, algorithm 1: a program owns M queries of one head,
walks tiles of N keys, and rescales its sums whenever the maximum m of a row grows. Shapes: q, o
[B, H, Tq, D], k, v [B, H / GROUP, Tk, D], as descriptors of tiles, which read zeros past an end.
Exponents are to base 2: scale_2 is the scale times log2 e.
"""

import triton
import triton.language as tl

from blockshock.kernels.flash_walk import (
    ANY,
    entry,
    hidden,
    interval,
    kept_factor,
    of_queries,
    own,
)

LN2 = tl.constexpr(0.6931471805599453)

# Arguments stand in groups.
# fmt: off


@triton.jit
def _tiles(
    total, weight, most, q, k, v, others, masks, first, last, full, end, b, row, group, queries,
    from_key, to_key, bits, scale_2, seed, threshold, factor, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr,
    DROP: tl.constexpr, LOOKED_UP: tl.constexpr, MASKED: tl.constexpr,
):
    """The state of a tile of queries after some more tiles of keys.

    MASKED: the scores of no tile are, of "all", or of "some": those outside full to end, or
    LOOKED_UP those with a mask.
    """
    place = tl.arange(0, N)[None, :]
    tile, mask = first, first
    if LOOKED_UP:
        tile, mask = entry(others, masks, first, last)
    for at in tl.range(first, last, num_stages=STAGES):
        if LOOKED_UP:  # one tile ahead: the loads of a tile need not wait for its number
            next_tile, next_mask = entry(others, masks, at + 1, last)
        else:
            tile = at
        key_tile = k.load([b, group, tile * N, 0]).reshape(N, D)
        scores = tl.dot(q, key_tile.T, input_precision=PRECISION)
        if MASKED == "all":
            scores = hidden(scores, tile, mask, from_key, to_key, bits, M, N, KEEP)
        elif MASKED == "some":
            partial = mask >= 0 if LOOKED_UP else (tile < full) | (tile >= end)
            if partial:
                scores = hidden(scores, tile, mask, from_key, to_key, bits, M, N, KEEP)
        larger = tl.maximum(most, tl.max(scores, 1) * scale_2)
        # Of a row without a score yet, or with -inf only, the maximum is no number to subtract.
        level = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(scores * scale_2 - level[:, None])
        shrink = tl.exp2(most - level)
        weight = weight * shrink + tl.sum(p, 1)
        most = larger
        total = total * shrink[:, None]
        if DROP:
            p *= kept_factor(seed, threshold, factor, row, queries[:, None], tile * N + place)
        value_tile = v.load([b, group, tile * N, 0]).reshape(N, D)
        total = tl.dot(p.to(value_tile.dtype), value_tile, total, input_precision=PRECISION)
        if LOOKED_UP:
            tile, mask = next_tile, next_mask
    return total, weight, most


@triton.jit
def finished(total, weight, most):
    """out, and lse to base 2; zero and -inf for a row that attends to nothing."""
    empty = weight == 0.0
    weight = tl.where(empty, 1.0, weight)
    return total * (1.0 / weight)[:, None], tl.where(empty, float("-inf"), most + tl.log2(weight))


@triton.jit(do_not_specialize=ANY)
def forward(
    q, k, v, o, lse, parts, levels, turns, others, masks, low, high, bits, batch_stride,
    head_stride, heads, tiles, pieces, slots, Tq, Tk, shift, scale_2, seed, threshold, factor,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr, DROP: tl.constexpr,
    LISTED: tl.constexpr, CONSECUTIVE: tl.constexpr, OWN_IN_REGISTERS: tl.constexpr,
):
    """Grid: a program for each piece of each of `tiles` tiles of queries, or for each turn, of each
    head, the longest first. parts [B * H * slots, M, D] and levels [B * H * slots, M], float32, of
    slots: out, and lse to base 2.
    """
    row, b, head, tile, first, last, full, end, slot = of_queries(
        turns, batch_stride, head_stride, heads, tiles, pieces, Tq, Tk, shift, M, N, KEEP, LISTED
    )
    queries = tile * M + tl.arange(0, M)
    from_key, to_key = interval(queries, low, high, Tq, Tk, shift, KEEP)
    query_tile = own(q.load([b, head, tile * M, 0]).reshape(M, D), OWN_IN_REGISTERS)
    most = tl.full((M,), float("-inf"), tl.float32)
    weight = tl.zeros((M,), tl.float32)
    total = tl.zeros((M, D), tl.float32)
    if not LISTED:
        total, weight, most = _tiles(
            total, weight, most, query_tile, k, v, others, masks, first, end, full, end, b, row,
            head // GROUP, queries, from_key, to_key, bits, scale_2, seed, threshold, factor, M, N,
            D, PRECISION, STAGES, KEEP, DROP, False, "none",
        )
        first = end
    total, weight, most = _tiles(
        total, weight, most, query_tile, k, v, others, masks, first, last, full, end, b, row,
        head // GROUP, queries, from_key, to_key, bits, scale_2, seed, threshold, factor, M, N, D,
        PRECISION, STAGES, KEEP, DROP, LISTED and not CONSECUTIVE, "some" if LISTED else "all",
    )
    out, of_rows = finished(total, weight, most)
    if slot >= 0:
        at = (row.to(tl.int64) * slots + slot) * M + tl.arange(0, M)
        inside = queries < Tq
        place = parts + at[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(place, out, inside[:, None])
        tl.store(levels + at, of_rows, inside)
    else:
        o.store([b, head, tile * M, 0], out.to(o.dtype).reshape(1, 1, M, D))
        tl.store(lse + row.to(tl.int64) * Tq + queries, of_rows * LN2, queries < Tq)
