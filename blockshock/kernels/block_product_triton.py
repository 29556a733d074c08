"""The Triton kernels behind `blockshock.kernels.block_product`.

Operands are read by tensor descriptors, which give zeros past an end. A tile of X serves one line
of tiles of W and no other: reading X from L2 bounds the product, so a program owns many rows of X.
"""

import triton
import triton.language as tl

# Arguments stand in groups.
# fmt: off


@triton.jit(do_not_specialize=["count", "parts", "group"])
def product(
    x, values, y, z, bias, starts, others, numbers, turns, count, parts, group, N,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
):
    """Grid: a program for each of `count` lines and each of `parts` parts of ROWS rows of X.

    After `group` parts, which L2 has room for, come the next; in a group the longest lines begin.
    TRANSPOSED: lines are columns of W. KEEP: also z, without the activation.
    """
    STEPS: tl.constexpr = BLOCK // STEP
    first_part = tl.program_id(0) // (group * count) * group
    height = tl.minimum(parts - first_part, group)
    inside = tl.program_id(0) % (group * count)
    row = (first_part + inside % height) * ROWS
    line = tl.load(turns + inside // height)
    first, last = tl.load(starts + line) * STEPS, tl.load(starts + line + 1) * STEPS
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    other, number = _entry(others, numbers, first // STEPS, last // STEPS, TRANSPOSED)
    for at in tl.range(first, last, num_stages=STAGES):
        # One step ahead: the loads of a tile need not wait for its number.
        following = _entry(others, numbers, (at + 1) // STEPS, last // STEPS, TRANSPOSED)
        k = at % STEPS * STEP
        x_tile = x.load([row, other * BLOCK + k])
        if TRANSPOSED:
            total = tl.dot(x_tile, values.load([number * BLOCK + k, 0]), total)
        else:
            total = tl.dot(x_tile, values.load([number * BLOCK, k]).T, total)
        other, number = following
    if BIAS:
        n = line * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(bias + n, n < N, 0).to(tl.float32)[None, :]
    if KEEP:
        z.store([row, line * BLOCK], total.to(z.dtype))
    if ACTIVATION == "relu":
        total = tl.where(total < 0, 0.0, total)  # NaN stays
    elif ACTIVATION == "gelu":
        total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
    y.store([row, line * BLOCK], total.to(y.dtype))


@triton.jit
def _entry(others, numbers, at, last, TRANSPOSED: tl.constexpr):
    """(line of the other side, tile) of an entry; anything past the end of a line."""
    number = at
    if TRANSPOSED:
        number = tl.load(numbers + at, at < last, 0)
    return tl.load(others + at, at < last, 0), number


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
