"""FlashAttention's forward as a Triton kernel, dense, causal or over lists of tiles.

    S = scale · Q Kᵀ,   P = exp(S − m),   O = P V / Σ P,   lse = m + ln Σ P      row by row

Dao 2023, "FlashAttention-2", arXiv:2307.08691, algorithm 1: a program owns M queries of one head,
walks tiles of N keys, and rescales its sums whenever the maximum m of a row grows. Shapes: q, o
[B, H, Tq, D], k, v [B, H / GROUP, Tk, D], as descriptors of tiles, which read zeros past an end.
Exponents are to base 2: scale_2 is the scale times log2 e.
"""

import triton
import triton.language as tl

from blockshock.kernels.flash_walk import ANY, counts, interval, kept_factor, key_runs

LN2 = tl.constexpr(0.6931471805599453)

# Arguments stand in groups.
# fmt: off


@triton.jit
def _tiles(
    total, weight, most, q, k, v, others, masks, first, last, b, row, group, queries, from_key,
    to_key, bits, scale_2, seed, threshold, factor, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr,
    DROP: tl.constexpr, LISTED: tl.constexpr, MASKED: tl.constexpr,
):
    """The state of a tile of queries after some more tiles of keys."""
    place = tl.arange(0, N)[None, :]
    for at in tl.range(first, last, num_stages=STAGES):
        tile = tl.load(others + at) if LISTED else at
        key_tile = k.load([b, group, tile * N, 0]).reshape(N, D)
        scores = tl.dot(q, key_tile.T, input_precision=PRECISION)
        if MASKED:
            mask = tl.load(masks + at) if KEEP == "bits" else 0
            keep = counts(
                tile * N + place, from_key[:, None], to_key[:, None], bits, mask,
                tl.arange(0, M)[:, None], place, M, N, KEEP,
            )
            scores = tl.where(keep, scores, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, 1) * scale_2)
        level = larger
        if MASKED:  # of a row without a score yet, the maximum is no number to subtract
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
    return total, weight, most


@triton.jit(do_not_specialize=ANY)
def forward(
    q, k, v, o, lse, turns, others, masks, low, high, bits, batch_stride, head_stride, heads,
    tiles, Tq, Tk, scale_2, seed, threshold, factor, GROUP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    KEEP: tl.constexpr, DROP: tl.constexpr, LISTED: tl.constexpr, CONSECUTIVE: tl.constexpr,
):
    """Grid: a program for each of `tiles` tiles of queries of each head, the longest first."""
    row = tl.program_id(0) // tiles
    b, head = row // heads, row % heads
    tile, begin, end, first, last = key_runs(
        turns, b * batch_stride + head * head_stride, tiles, tl.program_id(0) % tiles, Tq, Tk, M,
        N, KEEP, LISTED,
    )
    queries = tile * M + tl.arange(0, M)
    from_key, to_key = interval(queries, low, high, Tq, Tk, KEEP)
    query_tile = q.load([b, head, tile * M, 0]).reshape(M, D)
    most = tl.full((M,), float("-inf"), tl.float32)
    weight = tl.zeros((M,), tl.float32)
    total = tl.zeros((M, D), tl.float32)
    total, weight, most = _tiles(
        total, weight, most, query_tile, k, v, others, masks, begin, end, b, row, head // GROUP,
        queries, from_key, to_key, bits, scale_2, seed, threshold, factor, M, N, D, PRECISION,
        STAGES, KEEP, DROP, LISTED and not CONSECUTIVE, False,
    )
    total, weight, most = _tiles(
        total, weight, most, query_tile, k, v, others, masks, first, last, b, row, head // GROUP,
        queries, from_key, to_key, bits, scale_2, seed, threshold, factor, M, N, D, PRECISION,
        STAGES, KEEP, DROP, LISTED, True,
    )
    empty = weight == 0.0
    weight = tl.where(empty, 1.0, weight)
    out = total / weight[:, None]
    o.store([b, head, tile * M, 0], out.to(o.dtype).reshape(1, 1, M, D))
    logarithm = tl.where(empty, float("-inf"), (most + tl.log2(weight)) * LN2)
    tl.store(lse + row.to(tl.int64) * Tq + queries, logarithm, queries < Tq)
