"""FlashAttention's backward as Triton kernels, dense, causal or over lists of tiles.

    P  = exp(scale · Q Kᵀ − lse),   Δ = rowsum(O ∘ dO)
    dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ − Δ),   dQ = scale · dS K,   dK = scale · dSᵀ Q

Dao 2023, arXiv:2307.08691, algorithm 2, in two kernels, so that no sum needs atomics and two runs
give the same bits: one owns N keys and walks tiles of M queries (dK and dV, of all query heads of
its group), the other owns M queries and walks keys (dQ). P is computed in both. Shapes as in
`flash_forward`; level [B * H, Tq] is lse in base 2, and +inf for a row that attends to nothing,
whose P is then zero. Vectors of a tile of queries are read by the memory accelerator as well:
loaded by threads, they took half of the instructions in the loop of dK and dV (Triton 3.6). Rows
past Tq read as zeros, and add nothing.
"""

import triton
import triton.language as tl

from blockshock.kernels.flash_walk import (
    ANY,
    entry,
    hidden,
    hidden_transposed,
    interval,
    kept_factor,
    listed,
    of_queries,
    own,
)

LOG2E = tl.constexpr(1.4426950408889634)

# Arguments stand in groups.
# fmt: off


@triton.jit(do_not_specialize=("tiles", "heads", "Tq", "pitch"))
def prepare(o, do, lse, level, delta, tiles, heads, Tq, pitch, M: tl.constexpr, D: tl.constexpr):
    """level and Δ [B * H, pitch] of a tile of queries."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, head = row // heads, row % heads
    out = o.load([b, head, tile * M, 0]).reshape(M, D).to(tl.float32)
    upstream = do.load([b, head, tile * M, 0]).reshape(M, D).to(tl.float32)
    queries = tile * M + tl.arange(0, M)
    natural = tl.load(lse + row.to(tl.int64) * Tq + queries, queries < Tq, float("-inf"))
    nothing = natural == float("-inf")
    place = row.to(tl.int64) * pitch + queries
    tl.store(level + place, tl.where(nothing, float("inf"), natural * LOG2E), queries < pitch)
    tl.store(delta + place, tl.sum(out * upstream, 1), queries < pitch)


@triton.jit
def _query_tiles(
    dk, dv, key_tile, value_tile, q, do, level, delta, others, masks, first, last, b, head,
    row, keys, low, high, bits, shift, scale_2, seed, threshold, factor, M: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    KEEP: tl.constexpr, DROP: tl.constexpr, LOOKED_UP: tl.constexpr, MASKED: tl.constexpr,
):
    """dK, dV of a tile of keys after some more tiles of queries of a head. Scores are [N, M].

    LOOKED_UP, the scores of tiles with a mask are masked; else MASKED says of all or none.
    """
    tile, mask = first, first
    if LOOKED_UP:
        tile, mask = entry(others, masks, first, last)
    for at in tl.range(first, last, num_stages=STAGES):
        if LOOKED_UP:
            next_tile, next_mask = entry(others, masks, at + 1, last)
        else:
            tile = at
        query_tile = q.load([b, head, tile * M, 0]).reshape(M, D)
        scores = tl.dot(key_tile, query_tile.T, input_precision=PRECISION)
        levels = level.load([row, tile * M]).reshape(M)
        # Here, not where it is used: a wait while dV's product runs makes every product wait.
        deltas = delta.load([row, tile * M]).reshape(M)
        exponents = scores * scale_2 - levels[None, :]
        if MASKED == "all":
            exponents = hidden_transposed(
                exponents, keys, tile, mask, low, high, bits, shift, M, N, KEEP
            )
        elif MASKED == "some":
            partial = mask >= 0
            if partial:
                exponents = hidden_transposed(
                    exponents, keys, tile, mask, low, high, bits, shift, M, N, KEEP
                )
        p = tl.exp2(exponents)
        upstream = do.load([b, head, tile * M, 0]).reshape(M, D)
        weighted = tl.dot(value_tile, upstream.T, input_precision=PRECISION)
        kept = p
        if DROP:
            queries = (tile * M + tl.arange(0, M))[None, :]
            chance = kept_factor(seed, threshold, factor, row, queries, keys[:, None])
            weighted *= chance
            kept = p * chance
        dv = tl.dot(kept.to(upstream.dtype), upstream, dv, input_precision=PRECISION)
        ds = p * (weighted - deltas[None, :])
        dk = tl.dot(ds.to(query_tile.dtype), query_tile, dk, input_precision=PRECISION)
        if LOOKED_UP:
            tile, mask = next_tile, next_mask
    return dk, dv


@triton.jit
def _head(
    dk, dv, key_tile, value_tile, q, do, level, delta, turns, others, masks, b, head, row, plane,
    tiles, turn, tile, keys, low, high, bits, Tq, shift, scale_2, seed, threshold, factor,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, KEEP: tl.constexpr, DROP: tl.constexpr, LISTED: tl.constexpr,
    CONSECUTIVE: tl.constexpr,
):
    """dK, dV of a tile of keys after all its tiles of queries of one head."""
    if LISTED:
        _, first, last, full, end, _ = listed(turns, plane, tiles, turn)
    else:
        end = tile * 0 + tl.cdiv(Tq, M)
        last = end
        full = tile * 0
        first = full
        if KEEP == "causal":
            first = tl.minimum(tl.maximum(tile * N - shift, 0) // M, end)
            full = tl.minimum(tl.cdiv(tl.maximum((tile + 1) * N - 1 - shift, 0), M), end)
    if LISTED and not CONSECUTIVE:
        dk, dv = _query_tiles(
            dk, dv, key_tile, value_tile, q, do, level, delta, others, masks, first,
            last, b, head, row, keys, low, high, bits, shift, scale_2, seed, threshold, factor,
            M, N, D, PRECISION, STAGES, KEEP, DROP, True, "some",
        )
    else:
        if LISTED or KEEP == "causal":
            dk, dv = _query_tiles(
                dk, dv, key_tile, value_tile, q, do, level, delta, others, masks,
                first, full, b, head, row, keys, low, high, bits, shift, scale_2, seed, threshold,
                factor, M, N, D, PRECISION, STAGES, KEEP, DROP, False, "all",
            )
        dk, dv = _query_tiles(
            dk, dv, key_tile, value_tile, q, do, level, delta, others, masks, full,
            end, b, head, row, keys, low, high, bits, shift, scale_2, seed, threshold, factor,
            M, N, D, PRECISION, STAGES, KEEP, DROP, False, "none",
        )
        if LISTED:
            dk, dv = _query_tiles(
                dk, dv, key_tile, value_tile, q, do, level, delta, others, masks,
                end, last, b, head, row, keys, low, high, bits, shift, scale_2, seed,
                threshold, factor, M, N, D, PRECISION, STAGES, KEEP, DROP, False, "all",
            )
    return dk, dv


@triton.jit(do_not_specialize=ANY)
def gradients_of_keys(
    q, k, v, do, dk, dv, level, delta, key_parts, value_parts, turns, others, masks, low, high,
    bits, batch_stride, head_stride, heads, tiles, slots, Tq, Tk, shift, scale_2, scale, seed,
    threshold, factor, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr, DROP: tl.constexpr,
    LISTED: tl.constexpr, CONSECUTIVE: tl.constexpr, OWN_IN_REGISTERS: tl.constexpr,
):
    """Grid: a program for each of `tiles` tiles of keys, or turns, of each head of k and v.

    key_parts, value_parts [B * H / GROUP * slots, N, D], float32, of slots.
    """
    groups = heads // GROUP
    b = tl.program_id(0) // tiles // groups
    group = tl.program_id(0) // tiles % groups
    turn = tl.program_id(0) % tiles
    if LISTED:  # the same tile and slot in all planes of a turn
        plane = b * batch_stride + group * GROUP * head_stride
        tile, _, _, _, _, slot = listed(turns, plane, tiles, turn)
    else:
        tile = turn
        slot = -1
    keys = tile * N + tl.arange(0, N)
    key_tile = own(k.load([b, group, tile * N, 0]).reshape(N, D), OWN_IN_REGISTERS)
    value_tile = own(v.load([b, group, tile * N, 0]).reshape(N, D), OWN_IN_REGISTERS)
    key_sum = tl.zeros((N, D), tl.float32)
    value_sum = tl.zeros((N, D), tl.float32)
    for member in range(GROUP):
        head = group * GROUP + member
        key_sum, value_sum = _head(
            key_sum, value_sum, key_tile, value_tile, q, do, level, delta, turns, others, masks, b,
            head, b * heads + head, b * batch_stride + head * head_stride, tiles, turn, tile, keys,
            low, high, bits, Tq, shift, scale_2, seed, threshold, factor, M, N, D, PRECISION,
            STAGES, KEEP, DROP, LISTED, CONSECUTIVE,
        )
    if slot >= 0:
        at = ((b * groups + group).to(tl.int64) * slots + slot) * N + tl.arange(0, N)
        at = at[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(key_parts + at, key_sum)
        tl.store(value_parts + at, value_sum)
    else:
        dk.store([b, group, tile * N, 0], (key_sum * scale).to(dk.dtype).reshape(1, 1, N, D))
        dv.store([b, group, tile * N, 0], value_sum.to(dv.dtype).reshape(1, 1, N, D))


@triton.jit
def _key_tiles(
    dq, query_tile, upstream, k, v, levels, deltas, others, masks, first, last, full, end, b, row,
    group, queries, from_key, to_key, bits, scale_2, seed, threshold, factor, M: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    KEEP: tl.constexpr, DROP: tl.constexpr, LOOKED_UP: tl.constexpr, MASKED: tl.constexpr,
):
    """dQ of a tile of queries after some more tiles of keys. Scores are [M, N].

    MASKED and LOOKED_UP as in the forward.
    """
    place = tl.arange(0, N)[None, :]
    tile, mask = first, first
    if LOOKED_UP:
        tile, mask = entry(others, masks, first, last)
    for at in tl.range(first, last, num_stages=STAGES):
        if LOOKED_UP:
            next_tile, next_mask = entry(others, masks, at + 1, last)
        else:
            tile = at
        key_tile = k.load([b, group, tile * N, 0]).reshape(N, D)
        value_tile = v.load([b, group, tile * N, 0]).reshape(N, D)
        scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION)
        exponents = scores * scale_2 - levels[:, None]
        if MASKED == "all":
            exponents = hidden(exponents, tile, mask, from_key, to_key, bits, M, N, KEEP)
        elif MASKED == "some":
            partial = mask >= 0 if LOOKED_UP else (tile < full) | (tile >= end)
            if partial:
                exponents = hidden(exponents, tile, mask, from_key, to_key, bits, M, N, KEEP)
        p = tl.exp2(exponents)
        weighted = tl.dot(upstream, value_tile.T, input_precision=PRECISION)
        if DROP:
            keys = tile * N + place
            weighted *= kept_factor(seed, threshold, factor, row, queries[:, None], keys)
        ds = p * (weighted - deltas[:, None])
        dq = tl.dot(ds.to(key_tile.dtype), key_tile, dq, input_precision=PRECISION)
        if LOOKED_UP:
            tile, mask = next_tile, next_mask
    return dq


@triton.jit(do_not_specialize=ANY)
def gradients_of_queries(
    q, k, v, do, dq, level, delta, parts, turns, others, masks, low, high, bits, batch_stride,
    head_stride, heads, tiles, slots, Tq, Tk, shift, scale_2, scale, seed, threshold, factor,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, KEEP: tl.constexpr, DROP: tl.constexpr,
    LISTED: tl.constexpr, CONSECUTIVE: tl.constexpr, OWN_IN_REGISTERS: tl.constexpr,
):
    """Grid: a program for each of `tiles` tiles of queries, or turns, of each head, the longest
    first. parts [B * H * slots, M, D], float32, of slots.
    """
    row, b, head, tile, first, last, full, end, slot = of_queries(
        turns, batch_stride, head_stride, heads, tiles, 1, Tq, Tk, shift, M, N, KEEP, LISTED
    )
    queries = tile * M + tl.arange(0, M)
    levels = level.load([row, tile * M]).reshape(M)
    deltas = delta.load([row, tile * M]).reshape(M)
    from_key, to_key = interval(queries, low, high, Tq, Tk, shift, KEEP)
    query_tile = own(q.load([b, head, tile * M, 0]).reshape(M, D), OWN_IN_REGISTERS)
    upstream = own(do.load([b, head, tile * M, 0]).reshape(M, D), OWN_IN_REGISTERS)
    total = tl.zeros((M, D), tl.float32)
    if not LISTED:
        total = _key_tiles(
            total, query_tile, upstream, k, v, levels, deltas, others, masks, first, end, full, end,
            b, row, head // GROUP, queries, from_key, to_key, bits, scale_2, seed, threshold,
            factor, M, N, D, PRECISION, STAGES, KEEP, DROP, False, "none",
        )
        first = end
    total = _key_tiles(
        total, query_tile, upstream, k, v, levels, deltas, others, masks, first, last, full, end, b,
        row, head // GROUP, queries, from_key, to_key, bits, scale_2, seed, threshold, factor, M, N,
        D, PRECISION, STAGES, KEEP, DROP, LISTED and not CONSECUTIVE, "some" if LISTED else "all",
    )
    if slot >= 0:
        at = (row.to(tl.int64) * slots + slot) * M + tl.arange(0, M)
        tl.store(parts + at[:, None] * D + tl.arange(0, D)[None, :], total)
    else:
        dq.store([b, head, tile * M, 0], (total * scale).to(dq.dtype).reshape(1, 1, M, D))
