"""FlashAttention's backward as Triton kernels, dense, causal or over lists of tiles.

    P  = exp(scale · Q Kᵀ − lse),   Δ = rowsum(O ∘ dO)
    dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ − Δ),   dQ = scale · dS K,   dK = scale · dSᵀ Q

Dao 2023, arXiv:2307.08691, algorithm 2, in two kernels, so that no sum needs atomics and two runs
give the same bits: one owns N keys and walks tiles of M queries (dK and dV, of all query heads of
its group), the other owns M queries and walks keys (dQ). P is computed in both. Shapes as in
`flash_forward`; level is lse in base 2, and +inf for a row that attends to nothing, whose P is then
zero.
"""

import triton
import triton.language as tl

from blockshock.kernels.flash_walk import ANY, counts, interval, kept_factor, key_runs, listed

LOG2E = tl.constexpr(1.4426950408889634)

# Arguments stand in groups.
# fmt: off


@triton.jit(do_not_specialize=("tiles", "heads"))
def prepare(o, do, lse, level, delta, tiles, heads, Tq, M: tl.constexpr, D: tl.constexpr):
    """level and Δ [B, H, Tq] of a tile of queries."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, head = row // heads, row % heads
    out = o.load([b, head, tile * M, 0]).reshape(M, D).to(tl.float32)
    upstream = do.load([b, head, tile * M, 0]).reshape(M, D).to(tl.float32)
    queries = tile * M + tl.arange(0, M)
    place = row.to(tl.int64) * Tq + queries
    natural = tl.load(lse + place, queries < Tq, 0.0)
    nothing = natural == float("-inf")
    tl.store(level + place, tl.where(nothing, float("inf"), natural * LOG2E), queries < Tq)
    tl.store(delta + place, tl.sum(out * upstream, 1), queries < Tq)


@triton.jit
def _query_tiles(
    dk, dv, key_tile, value_tile, q, do, level, delta, others, masks, first, last, b, head, row,
    own, low, high, bits, Tq, Tk, scale_2, seed, threshold, factor, M: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    KEEP: tl.constexpr, DROP: tl.constexpr, LISTED: tl.constexpr, MASKED: tl.constexpr,
):
    """dK, dV of a tile of keys after some more tiles of queries of a head. Scores are [N, M]."""
    for at in tl.range(first, last, num_stages=STAGES):
        tile = tl.load(others + at) if LISTED else at
        queries = tile * M + tl.arange(0, M)
        place = row.to(tl.int64) * Tq + queries
        query_tile = q.load([b, head, tile * M, 0]).reshape(M, D)
        scores = tl.dot(key_tile, query_tile.T, input_precision=PRECISION)
        levels = tl.load(level + place, queries < Tq, float("inf"))
        exponents = scores * scale_2 - levels[None, :]
        if MASKED:
            from_key, to_key = interval(queries, low, high, Tq, Tk, KEEP)
            mask = tl.load(masks + at) if KEEP == "bits" else 0
            keep = counts(
                own[:, None], from_key[None, :], to_key[None, :], bits, mask,
                tl.arange(0, M)[None, :], tl.arange(0, N)[:, None], M, N, KEEP,
            )
            exponents = tl.where(keep, exponents, float("-inf"))
        p = tl.exp2(exponents)
        upstream = do.load([b, head, tile * M, 0]).reshape(M, D)
        weighted = tl.dot(value_tile, upstream.T, input_precision=PRECISION)
        kept = p
        if DROP:
            chance = kept_factor(seed, threshold, factor, row, queries[None, :], own[:, None])
            weighted *= chance
            kept = p * chance
        dv = tl.dot(kept.to(upstream.dtype), upstream, dv, input_precision=PRECISION)
        deltas = tl.load(delta + place, queries < Tq, 0.0)
        ds = p * (weighted - deltas[None, :])
        dk = tl.dot(ds.to(query_tile.dtype), query_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=ANY)
def gradients_of_keys(
    q, k, v, do, dk, dv, level, delta, turns, others, masks, low, high, bits, batch_stride,
    head_stride, heads, tiles, Tq, Tk, scale_2, scale, seed, threshold, factor,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr, DROP: tl.constexpr,
    LISTED: tl.constexpr, CONSECUTIVE: tl.constexpr,
):
    """Grid: a program for each of `tiles` tiles of keys of each head of k and v."""
    groups = heads // GROUP
    b = tl.program_id(0) // tiles // groups
    group = tl.program_id(0) // tiles % groups
    turn = tl.program_id(0) % tiles
    tile = turn
    if LISTED:  # the same tile in all planes of a turn
        tile = listed(turns, b * batch_stride + group * GROUP * head_stride, tiles, turn)[0]
    own = tile * N + tl.arange(0, N)
    key_tile = k.load([b, group, tile * N, 0]).reshape(N, D)
    value_tile = v.load([b, group, tile * N, 0]).reshape(N, D)
    key_sum = tl.zeros((N, D), tl.float32)
    value_sum = tl.zeros((N, D), tl.float32)
    for member in range(GROUP):
        head = group * GROUP + member
        row = b * heads + head
        if LISTED:
            plane = b * batch_stride + head * head_stride
            _, begin, end, first, last = listed(turns, plane, tiles, turn)
        else:  # keys past Tk need no mask: what they gather is not stored
            begin = tile * 0
            end = begin + tl.cdiv(Tq, M)
            first = begin
            last = begin
            if KEEP == "causal":
                first = tl.minimum(tile * N // M, end)
                begin = tl.minimum(tl.cdiv((tile + 1) * N - 1, M), end)
                last = begin
        key_sum, value_sum = _query_tiles(
            key_sum, value_sum, key_tile, value_tile, q, do, level, delta, others, masks, first,
            last, b, head, row, own, low, high, bits, Tq, Tk, scale_2, seed, threshold, factor, M,
            N, D, PRECISION, STAGES, KEEP, DROP, LISTED, True,
        )
        key_sum, value_sum = _query_tiles(
            key_sum, value_sum, key_tile, value_tile, q, do, level, delta, others, masks, begin,
            end, b, head, row, own, low, high, bits, Tq, Tk, scale_2, seed, threshold, factor, M,
            N, D, PRECISION, STAGES, KEEP, DROP, LISTED and not CONSECUTIVE, False,
        )
    dk.store([b, group, tile * N, 0], (key_sum * scale).to(dk.dtype).reshape(1, 1, N, D))
    dv.store([b, group, tile * N, 0], value_sum.to(dv.dtype).reshape(1, 1, N, D))


@triton.jit
def _key_tiles(
    dq, query_tile, upstream, k, v, levels, deltas, others, masks, first, last, b, row, group,
    queries, from_key, to_key, bits, scale_2, seed, threshold, factor, M: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    KEEP: tl.constexpr, DROP: tl.constexpr, LISTED: tl.constexpr, MASKED: tl.constexpr,
):
    """dQ of a tile of queries after some more tiles of keys. Scores are [M, N]."""
    place = tl.arange(0, N)[None, :]
    for at in tl.range(first, last, num_stages=STAGES):
        tile = tl.load(others + at) if LISTED else at
        key_tile = k.load([b, group, tile * N, 0]).reshape(N, D)
        value_tile = v.load([b, group, tile * N, 0]).reshape(N, D)
        scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION)
        exponents = scores * scale_2 - levels[:, None]
        if MASKED:
            mask = tl.load(masks + at) if KEEP == "bits" else 0
            keep = counts(
                tile * N + place, from_key[:, None], to_key[:, None], bits, mask,
                tl.arange(0, M)[:, None], place, M, N, KEEP,
            )
            exponents = tl.where(keep, exponents, float("-inf"))
        p = tl.exp2(exponents)
        weighted = tl.dot(upstream, value_tile.T, input_precision=PRECISION)
        if DROP:
            keys = tile * N + place
            weighted *= kept_factor(seed, threshold, factor, row, queries[:, None], keys)
        ds = p * (weighted - deltas[:, None])
        dq = tl.dot(ds.to(key_tile.dtype), key_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=ANY)
def gradients_of_queries(
    q, k, v, do, dq, level, delta, turns, others, masks, low, high, bits, batch_stride,
    head_stride, heads, tiles, Tq, Tk, scale_2, scale, seed, threshold, factor,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr, DROP: tl.constexpr,
    LISTED: tl.constexpr, CONSECUTIVE: tl.constexpr,
):
    """Grid: a program for each of `tiles` tiles of queries of each head, the longest first."""
    row = tl.program_id(0) // tiles
    b, head = row // heads, row % heads
    tile, begin, end, first, last = key_runs(
        turns, b * batch_stride + head * head_stride, tiles, tl.program_id(0) % tiles, Tq, Tk, M,
        N, KEEP, LISTED,
    )
    queries = tile * M + tl.arange(0, M)
    place = row.to(tl.int64) * Tq + queries
    levels = tl.load(level + place, queries < Tq, float("inf"))
    deltas = tl.load(delta + place, queries < Tq, 0.0)
    from_key, to_key = interval(queries, low, high, Tq, Tk, KEEP)
    query_tile = q.load([b, head, tile * M, 0]).reshape(M, D)
    upstream = do.load([b, head, tile * M, 0]).reshape(M, D)
    total = tl.zeros((M, D), tl.float32)
    total = _key_tiles(
        total, query_tile, upstream, k, v, levels, deltas, others, masks, begin, end, b, row,
        head // GROUP, queries, from_key, to_key, bits, scale_2, seed, threshold, factor, M, N, D,
        PRECISION, STAGES, KEEP, DROP, LISTED and not CONSECUTIVE, False,
    )
    total = _key_tiles(
        total, query_tile, upstream, k, v, levels, deltas, others, masks, first, last, b, row,
        head // GROUP, queries, from_key, to_key, bits, scale_2, seed, threshold, factor, M, N, D,
        PRECISION, STAGES, KEEP, DROP, LISTED, True,
    )
    dq.store([b, head, tile * M, 0], (total * scale).to(dq.dtype).reshape(1, 1, M, D))
