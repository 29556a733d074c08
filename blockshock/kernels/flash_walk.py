"""What the Triton kernels of attention share: which tiles they walk, and which scores count there.

A program owns M queries (or N keys) and walks tiles of the other side. Without lists these follow
from the sizes and KEEP: the full ones, then the partial ones, whose scores are masked. LISTED, they
stand in `attention.blocks`: counted, where all touched tiles follow each other (CONSECUTIVE), else
looked up. What a piece of a split list gives is left in its slot, for `flash_split`.

KEEP says which scores of a partial tile count:

    "ragged"    keys before Tk
    "causal"    keys up to the query's place + shift, before Tk
    "interval"  keys from low[query] to high[query]
    "bits"      those whose bit is set in the tile's own mask
"""

import triton
import triton.language as tl

# Numbers whose value no kernel is compiled anew for.
ANY = (
    "heads",
    "tiles",
    "pieces",
    "slots",
    "Tk",
    "shift",
    "batch_stride",
    "head_stride",
    "seed",
    "threshold",
)

# Arguments stand in groups.
# fmt: off


@triton.jit
def listed(turns, plane, tiles, turn):
    """A program's turn, as in `attention.turns`: its tile; from and to of what it walks; from and
    to of what is full there; its slot.
    """
    at = turns + (plane * tiles + turn) * 6
    tile, first, last = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    return tile, first, last, tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def of_queries(
    turns, batch_stride, head_stride, heads, tiles, pieces, Tq, Tk, shift, M: tl.constexpr,
    N: tl.constexpr, KEEP: tl.constexpr, LISTED: tl.constexpr,
):
    """Of a program that owns queries: its row among B * H, b and head, then what `listed` tells.

    Without lists the keys of a tile are walked by several programs, one for each of its `pieces`.
    """
    row = tl.program_id(0) // (tiles * pieces)
    b, head = row // heads, row % heads
    piece = tl.program_id(0) % (tiles * pieces) // tiles
    turn = tl.program_id(0) % tiles
    if LISTED:
        plane = b * batch_stride + head * head_stride
        tile, first, last, full, end, slot = listed(turns, plane, tiles, turn)
    else:  # the full tiles come first
        if KEEP == "causal":  # the longest first
            tile = tiles - 1 - turn
            end = tl.maximum(tl.minimum(tile * M + 1 + shift, Tk), 0) // N
            last = tl.minimum(tl.minimum((tile + 1) * M, Tq) + shift, Tk)
            last = tl.cdiv(tl.maximum(last, 0), N)
        else:
            tile = turn
            end = tile * 0 + Tk // N
            last = tile * 0 + tl.cdiv(Tk, N)
        first = piece * last // pieces
        last = (piece + 1) * last // pieces
        end = tl.minimum(tl.maximum(end, first), last)
        full = first
        slot = tl.where(pieces > 1, tile * pieces + piece, -1)
    return row, b, head, tile, first, last, full, end, slot


@triton.jit
def entry(others, masks, at, last):
    """Tile and mask of an entry of a list; anything past its end."""
    return tl.load(others + at, at < last, 0), tl.load(masks + at, at < last, -1)


@triton.jit
def interval(queries, low, high, Tq, Tk, shift, KEEP: tl.constexpr):
    """From which key to which the queries attend; not used under "bits"."""
    from_key = tl.zeros_like(queries)
    to_key = from_key + Tk
    if KEEP == "interval":
        from_key = tl.load(low + queries, queries < Tq, 0)
        to_key = tl.load(high + queries, queries < Tq, 0)
    elif KEEP == "causal":
        to_key = tl.minimum(queries + 1 + shift, Tk)
    return from_key, to_key


@triton.jit
def own(tile, IN_REGISTERS: tl.constexpr):
    """A program's own tile as a product's first operand.

    Loaded, it stays in shared memory and is read there for every product; computed, even by an
    addition of zero, it is one of registers. (A zero may lose its sign.)
    """
    if IN_REGISTERS:
        tile += 0.0
    return tile


@triton.jit
def hidden(
    scores, tile, mask, from_key, to_key, bits, M: tl.constexpr, N: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Scores [M, N] of a partial tile of keys, -inf where they do not count."""
    place = tl.arange(0, N)[None, :]
    if KEEP == "bits":
        words, beyond = _words(bits, mask, M, N)
        keep = _is_set(words[:, None], beyond[:, None], place)
    else:
        keys = tile * N + place
        keep = keys < to_key[:, None]
        if KEEP == "interval":
            keep &= keys >= from_key[:, None]
    return tl.where(keep, scores, float("-inf"))


@triton.jit
def hidden_transposed(
    scores, keys, tile, mask, low, high, bits, shift, M: tl.constexpr, N: tl.constexpr,
    KEEP: tl.constexpr,
):
    """The same of scores [N, M] of a partial tile of queries; low and high are descriptors."""
    if KEEP == "bits":
        words, beyond = _words(bits, mask, M, N)
        keep = _is_set(words[None, :], beyond[None, :], tl.arange(0, N)[:, None])
    elif KEEP == "interval":
        keep = (keys[:, None] >= low.load([tile * M])[None, :]) & (
            keys[:, None] < high.load([tile * M])[None, :]
        )
    else:  # "causal"; keys past Tk need no mask: what they gather is not stored
        keep = keys[:, None] - shift <= (tile * M + tl.arange(0, M))[None, :]
    return tl.where(keep, scores, float("-inf"))


@triton.jit
def _words(bits, mask, M: tl.constexpr, N: tl.constexpr):
    """A mask's words, of each query: for 32 keys, and for the 32 behind them where N is 64."""
    tl.static_assert(N == 32 or N == 64)
    at = bits + mask.to(tl.int64) * (M * N // 32) + tl.arange(0, M) * (N // 32)
    words = tl.load(at)
    beyond = words
    if N == 64:
        beyond = tl.load(at + 1)
    return words, beyond


@triton.jit
def _is_set(words, beyond, place):
    """Whether the bits of the keys at these places of a tile are set; the arguments broadcast."""
    return ((tl.where(place < 32, words, beyond) >> (place % 32)) & 1) != 0


@triton.jit
def kept_factor(seed, threshold, factor, row, queries, keys):
    """Dropout's factor of each score, 0 or `factor`; see `dropout`. seed: a number or its place."""
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    zero = tl.zeros_like(queries + keys)
    random, _, _, _ = tl.philox(
        seed, (keys + zero).to(tl.uint32), (queries + zero).to(tl.uint32),
        (row + zero).to(tl.uint32), zero.to(tl.uint32),
    )
    return tl.where(random.to(tl.int64) >= threshold, factor, 0.0)
