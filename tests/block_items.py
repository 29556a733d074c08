"""What the programs of the block-sparse product take, as a kernel for tests."""

import triton
import triton.language as tl

from blockshock.kernels.block_product_triton import _item


@triton.jit
def items_of(turns, found, count, parts, group, programs, kept, ITEMS: tl.constexpr):
    """found [programs, ITEMS, 4]: part, line, first entry, last one's end of each item."""
    turn = tl.arange(0, ITEMS)
    part, line, first, last = _item(turn, turns, count, parts, group, programs, kept)
    at = found + (tl.program_id(0) * ITEMS + turn) * 4
    tl.store(at, part)
    tl.store(at + 1, line)
    tl.store(at + 2, first)
    tl.store(at + 3, last)
