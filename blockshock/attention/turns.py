"""The lists of a block table as programs take them: turn after turn, the longest first.

    turn = (line, from, to, from_full, to_full, slot)       int32 [P, turns, 6]
    split = (line, from_slot, to_slot)                      int32 [splits, 3]

A program works on the tiles of one turn. That is a whole line (a tile of queries with its list, or
of keys), slot -1; or a piece of one that is so long that the others would be done before it: what
its pieces give is put into slots, and summed afterwards. Tiles are numbers where the lists are
`consecutive`, else places in the list. Every plane has the same lines, pieces and slots.
"""

import torch
from torch import Tensor

# A list is split where it is longer than LONG mean ones, and than LEAST tiles. On one H200, bf16,
# D = 128, 16 heads of 16384 tokens under global_band(64, 256), LONG = 2, 4, 8 and none took 0.257,
# 0.258, 0.277 and 0.374 ms forward. LEAST is not tuned.
LONG, LEAST = 4, 16
SHARE = 0.5  # slots a line at most: in float32 as much memory as all tiles of out in bf16


def turns(
    starts: Tensor, full: Tensor, others: Tensor, *, consecutive: bool, together: bool
) -> tuple[Tensor, Tensor, int]:
    """The turns, the splits and how many slots a plane has.

    Of the lists starts [P, lines + 1], full [P, lines], others [entries], as in a block table.

    together: one order of turns in all planes. Query heads that share a head of keys may be
    different planes, and a program works on one line of them all.
    """
    planes, lines = full.shape
    begin, count = starts[:, :-1].long(), starts.diff(dim=1).long()
    longest = count.amax(0) if planes else count.sum(0)
    pieces = _pieces(longest, max(LEAST, LONG * -(-len(others) // max(planes * lines, 1))))
    of = torch.arange(lines, device=full.device).repeat_interleave(pieces)  # a turn's line
    piece = torch.arange(len(of), device=full.device) - (pieces.cumsum(0) - pieces)[of]
    slot = torch.where(pieces > 1, pieces, 0)
    first_slot = slot.cumsum(0) - slot

    whole = begin
    if consecutive and len(others):
        begin, _, whole, _ = _ends(starts, full, others)
    first, last = (begin[:, of] + count[:, of] * n // pieces[of] for n in (piece, piece + 1))
    found = (
        of.expand(planes, -1),
        first,
        last,
        whole[:, of].clamp(first, last),
        (whole + full)[:, of].clamp(first, last),
        torch.where(pieces[of] > 1, first_slot[of] + piece, -1).expand(planes, -1),
    )
    length = last - first
    length = length.sum(0, keepdim=True).expand_as(length) if together else length
    order = length.argsort(dim=1, descending=True, stable=True)
    split = (pieces > 1).nonzero().squeeze(1)
    slots = torch.stack([split, first_slot[split], (first_slot + slot)[split]], dim=1)
    in_order = torch.stack([x.gather(1, order) for x in found], dim=2)
    return in_order.int(), slots.int(), int(slot.sum())


def _pieces(lengths: Tensor, most: int) -> Tensor:
    """Into how many pieces of `most` tiles, or of more where slots are too few; one at least."""
    while True:
        pieces = ((lengths + most - 1) // most).clamp(min=1)
        if int(pieces[pieces > 1].sum()) <= SHARE * len(lengths):
            return pieces
        most *= 2


def are_consecutive(starts: Tensor, full: Tensor, others: Tensor) -> bool:
    """Whether the tiles of each list are numbered without a gap, and the full ones among them."""
    if not len(others):
        return True
    count, (first, last, first_full, last_full) = starts.diff(dim=1), _ends(starts, full, others)
    gapless = (count == 0) | (last - first == count - 1)
    return bool((gapless & ((full == 0) | (last_full - first_full == full - 1))).all())


def _ends(starts: Tensor, full: Tensor, others: Tensor) -> tuple[Tensor, ...]:
    """The least and the largest number of each list, and of the full ones in it; int64 [P, lines].

    Anything where there are none.
    """
    first, last, others = starts[:, :-1].long(), starts[:, 1:].long() - 1, others.long()
    last_full, first_partial = first + full - 1, first + full
    low = torch.where(first_partial > last, first, first_partial)
    high = torch.where(last_full < first, last, last_full)

    def at(place):
        return others[place.clamp(0, len(others) - 1)]

    least, largest = torch.minimum(at(first), at(low)), torch.maximum(at(last), at(high))
    return least, largest, at(first), at(last_full)
