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
    ITEMS: tl.constexpr, PIECES: tl.constexpr, TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, KEEP: tl.constexpr,
):
    """Grid: `programs`, which share the items: a line of `count` and a part of ROWS rows of X each.

    A program walks the tiles of all its items, ITEMS at most, in one loop, so that tiles of the
    next item are on their way while one is written, in PIECES. With one item a program this needs
    no room beside the tiles, and other programs of the processor fill the gaps. TRANSPOSED: lines
    are columns of W. KEEP: also z, without the activation.
    """
    # The matrix units read the right operand again for each 64 rows of the left one, and take up to
    # 256 columns of it at once: so the wider tile is the right one.
    WIDE: tl.constexpr = ROWS > BLOCK and BLOCK >= 64
    part, line, at, last = _item(0, turns, count, parts, group, programs, kept)
    steps = last - at
    if ITEMS > 1:
        _, _, first, end = _item(tl.arange(0, ITEMS), turns, count, parts, group, programs, kept)
        steps = tl.sum(end - first, 0)
    # The tile of the next step is known before its loads begin.
    other, number = _entry(others, numbers, at, across, kept, TRANSPOSED)
    turn, k = 0, 0
    # Whether a step is the last of its item. Known a step before: under one condition Triton would
    # join writing the item with finding the next one, which the loads need earlier.
    ends = (at + 1 == last) & (BLOCK == STEP)
    total = tl.zeros((BLOCK, ROWS) if WIDE else (ROWS, BLOCK), tl.float32)
    for _ in tl.range(0, steps * (BLOCK // STEP), num_stages=STAGES):
        x_tile = x.load([part * ROWS, other * BLOCK + k])
        if TRANSPOSED:
            w_tile = values.load([number * BLOCK + k, 0])
        else:
            w_tile = values.load([number * BLOCK, k]).T
        if WIDE:
            total = tl.dot(w_tile.T, x_tile.T, total)
        else:
            total = tl.dot(x_tile, w_tile, total)
        if ITEMS > 1:  # noqa: SIM102  this is known at compilation, `ends` is not
            if ends:
                _finish(total, y, z, bias, part, line, N, WIDE, PIECES, ACTIVATION, BIAS, KEEP)
                total = tl.zeros((BLOCK, ROWS) if WIDE else (ROWS, BLOCK), tl.float32)
        k = (k + STEP) % BLOCK
        at += (k == 0).to(tl.int32)
        if ITEMS > 1:
            if at == last:
                turn += 1
                part, line, at, last = _item(turn, turns, count, parts, group, programs, kept)
            ends = (at + 1 == last) & (k + STEP == BLOCK)
        other, number = _entry(others, numbers, at, across, kept, TRANSPOSED)
    if ITEMS == 1:
        _finish(total, y, z, bias, part, line, N, WIDE, PIECES, ACTIVATION, BIAS, KEEP)


@triton.jit
def _item(turn, turns, count, parts, group, programs, kept):
    """(part, line, its first entry, its last one's end) of an item of a program.

    After `group` parts, which L2 has room for, come the next. In a group the longest lines begin,
    in every other one, counted from the last, the shortest; and every other turn goes backwards
    over the programs: so none of them has the longer line each time. A line without tiles has one
    entry, past all. What is past a program's items has none.
    """
    own = tl.program_id(0)
    item = turn * programs + tl.where(turn % 2 == 0, own, programs - 1 - own)
    there = item < parts * count
    before = item // (group * count) * group
    height = tl.maximum(tl.minimum(parts - before, group), 1)
    inside = item % (group * count)
    place = inside // height
    place = tl.where((parts - 1 - before) // group % 2 == 0, place, count - 1 - place)
    at = turns + place * 3
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


@triton.jit
def _finish(
    total, y, z, bias, part, line, N, WIDE: tl.constexpr, PIECES: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
):
    """Writes a tile of Y, and of Z, from its sums; WIDE: from their transpose."""
    if WIDE:
        total = total.T
    ROWS: tl.constexpr = total.shape[0]
    BLOCK: tl.constexpr = total.shape[1]
    if BIAS:
        n = line * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(bias + n, n < N, 0).to(tl.float32)[None, :]
    if KEEP:
        _write(z, part * ROWS, line * BLOCK, total.to(z.dtype), PIECES)
    if ACTIVATION == "relu":
        total = tl.where(total < 0, 0.0, total)  # NaN stays
    elif ACTIVATION == "gelu":
        total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
    _write(y, part * ROWS, line * BLOCK, total.to(y.dtype), PIECES)


@triton.jit
def _write(out, row, column, tile, PIECES: tl.constexpr):
    """Through shared memory, where each piece needs the room of the one before it."""
    ROWS: tl.constexpr = tile.shape[0]
    BLOCK: tl.constexpr = tile.shape[1]
    if PIECES == 1:
        out.store([row, column], tile)
    else:
        halves = tl.permute(tl.reshape(tile, (2, ROWS // 2, BLOCK)), (1, 2, 0))
        upper, lower = tl.split(halves)
        out.store([row, column], upper)
        out.store([row + ROWS // 2, column], lower)


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
    # An operation after the loop lets Triton write the tile where the loads were; sums in float32
    # need no cast, and would get room of their own beside them, which a processor may not have.
    out.store([tl.program_id(0) * HEIGHT, 0], (total + 0.0).to(out.dtype))
