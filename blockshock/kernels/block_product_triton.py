"""The Triton kernels behind `blockshock.kernels.block_product`.

Operands are read by tensor descriptors, which give zeros past an end. A tile of X serves one line
of tiles of W and no other: reading X from L2 bounds the product, so a program owns many rows of X.
"""

import triton
import triton.language as tl

# Arguments stand in groups.
# fmt: off


@triton.jit(do_not_specialize=["count", "parts", "group", "programs", "across", "kept"])
def product(
    x, values, y, z, bias, others, numbers, turns, count, parts, group, programs, across, kept, N,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    ITEMS: tl.constexpr, TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Grid: `programs`, which share the items: a line of `count` and a part of ROWS rows of X each.

    A program walks the tiles of all its items, ITEMS at most, in one loop, so that tiles of the
    next item are on their way while one is finished. TRANSPOSED: lines are columns of W. KEEP: also
    z, without the activation.
    """
    _, _, first, end = _item(tl.arange(0, ITEMS), turns, count, parts, group, programs, kept)
    steps = tl.sum(end - first, 0) * (BLOCK // STEP)
    part, line, at, last = _item(0, turns, count, parts, group, programs, kept)
    # The next item is known, and of the next tile its number, before they are needed.
    next_part, next_line, next_at, next_last = _item(1, turns, count, parts, group, programs, kept)
    other, number = _entry(others, numbers, at, across, kept, TRANSPOSED)
    turn, k = 0, 0
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in tl.range(0, steps, num_stages=STAGES):
        x_tile = x.load([part * ROWS, other * BLOCK + k])
        if TRANSPOSED:
            total = tl.dot(x_tile, values.load([number * BLOCK + k, 0]), total)
        else:
            total = tl.dot(x_tile, values.load([number * BLOCK, k]).T, total)
        k = (k + STEP) % BLOCK
        at += (k == 0).to(tl.int32)
        ends = at == last
        if ends:
            if BIAS:
                n = line * BLOCK + tl.arange(0, BLOCK)
                total += tl.load(bias + n, n < N, 0).to(tl.float32)[None, :]
            if KEEP:
                z.store([part * ROWS, line * BLOCK], total.to(z.dtype))
            if ACTIVATION == "relu":
                total = tl.where(total < 0, 0.0, total)  # NaN stays
            elif ACTIVATION == "gelu":
                total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
            y.store([part * ROWS, line * BLOCK], total.to(y.dtype))
            total = tl.zeros((ROWS, BLOCK), tl.float32)
        part, line = tl.where(ends, next_part, part), tl.where(ends, next_line, line)
        at, last = tl.where(ends, next_at, at), tl.where(ends, next_last, last)
        turn += ends.to(tl.int32)
        next_part, next_line, next_at, next_last = _item(
            turn + 1, turns, count, parts, group, programs, kept
        )
        other, number = _entry(others, numbers, at, across, kept, TRANSPOSED)


@triton.jit
def _item(turn, turns, count, parts, group, programs, kept):
    """(part, line, its first entry, its last one's end) of an item of a program.

    After `group` parts, which L2 has room for, come the next; in a group the longest lines begin.
    Every other turn goes backwards over the programs, so that none has the longer line each time.
    A line without tiles has one entry, past all. What is past a program's items has none.
    """
    own = tl.program_id(0)
    item = turn * programs + tl.where(turn % 2 == 0, own, programs - 1 - own)
    there = item < parts * count
    before = item // (group * count) * group
    height = tl.maximum(tl.minimum(parts - before, group), 1)
    inside = item % (group * count)
    at = turns + inside // height * 3
    line, first, last = tl.load(at, there, 0), tl.load(at + 1, there, 0), tl.load(at + 2, there, 0)
    empty = there & (first == last)
    first, last = tl.where(empty, kept, first), tl.where(empty, kept + 1, last)
    return before + inside % height, line, first, last


@triton.jit
def _entry(others, numbers, at, across, kept, TRANSPOSED: tl.constexpr):
    """(line of the other side, tile) of an entry; past all of them what lies past both ends."""
    number = at
    if TRANSPOSED:
        number = tl.load(numbers + at, at < kept, kept)
    return tl.load(others + at, at < kept, across), number


@triton.jit(do_not_specialize=["count", "B", "piece"])
def gradient(
    dy, x, out, lines, others, count, B, piece, BLOCK: tl.constexpr, HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr,
):
    """Grid: for each piece of the B rows a program for HEIGHT rows of each of `count` tiles.

    out [pieces * count * BLOCK, BLOCK]: the tiles of dYᵀ X, over `piece` rows each.
    """
    PARTS: tl.constexpr = BLOCK // HEIGHT
    of_piece = tl.program_id(0) // (count * PARTS)
    part = tl.program_id(0) % (count * PARTS)
    n = tl.load(lines + part // PARTS) * BLOCK + part % PARTS * HEIGHT
    k = tl.load(others + part // PARTS) * BLOCK
    total = tl.zeros((HEIGHT, BLOCK), tl.float32)
    first = of_piece * piece
    for b in tl.range(first, tl.minimum(first + piece, B), DEPTH, num_stages=STAGES):
        total = tl.dot(dy.load([b, n]).T, x.load([b, k]), total)
    out.store([tl.program_id(0) * HEIGHT, 0], total.to(out.dtype))
