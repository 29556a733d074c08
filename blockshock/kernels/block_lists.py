"""The kept tiles of a tile mask as lists, which block-sparse kernels walk.

    mask [R, C] bool, True: kept        the kept tiles are numbered in row-major order

    rows      entries are the tiles row by row;  others: their columns
    columns   entries are the tiles column by column;  others: their rows;  numbers: which tiles
              they are, so that a product with Wᵀ reads the values of W
    turns     (line, its first entry, its last one's end) of the lines of a side, longest first

Work that begins in the order of `turns` ends at about the same time. Two Triton kernels make all of
it on a GPU: a mask may be new in every step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Side:
    """The tiles line by line. int32: others [kept], turns [lines, 3]."""

    others: Tensor
    turns: Tensor


@dataclass(frozen=True, eq=False)
class Lists:
    """Both sides. int32 [kept]: numbers, of the entries of `columns`; lines, the row of a tile."""

    rows: Side
    columns: Side
    numbers: Tensor
    lines: Tensor

    @property
    def kept(self) -> int:
        """How many tiles there are."""
        return len(self.lines)

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C): rows and columns of tiles."""
        return len(self.rows.turns), len(self.columns.turns)

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return self.lines.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(x.nbytes for x in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All of them; `of` makes the lists again."""
        r, c = self.rows, self.columns
        return [r.others, r.turns, c.others, c.turns, self.numbers, self.lines]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "Lists":
        """From `tensors`."""
        return cls(Side(*tensors[:2]), Side(*tensors[2:4]), *tensors[4:])

    def to(self, device) -> "Lists":
        """On another device; itself where it is there."""
        moved = [x.to(device) for x in self.tensors()]
        return self if moved[0] is self.rows.others else Lists.of(moved)

    def mask(self) -> Tensor:
        """The tile mask again: bool [R, C]."""
        mask = torch.zeros(self.grid, dtype=torch.bool, device=self.device)
        mask[self.lines.long(), self.rows.others.long()] = True
        return mask


def lists(mask: Tensor, kept: int | None = None) -> Lists:
    """The lists of a mask, bool [R, C], on its device.

    kept: how many are True, where that is known, as from `tiles.kept`: then nothing waits for the
    device. It must be right. None: they are counted, and the host waits.
    """
    if kept is None:
        kept = int(mask.sum())
    return lists_by_triton(mask, kept) if mask.is_cuda and kept else lists_reference(mask, kept)


def lists_by_triton(mask: Tensor, kept: int) -> Lists:
    """`lists` by two launches, or under Triton's interpreter; kept > 0."""
    from blockshock.kernels import block_lists_triton  # no Triton beside PyTorch's CPU build

    R, C = mask.shape
    sizes = kept, (R, 3), kept, (C, 3), kept, kept
    made = [torch.empty(size, dtype=torch.int32, device=mask.device) for size in sizes]
    block_lists_triton.fill(mask, made)
    return Lists.of(made)


def lists_reference(mask: Tensor, kept: int) -> Lists:
    """Plain-PyTorch `lists`."""
    number = (mask.flatten().cumsum(0) - 1).view(mask.shape)
    rows, line = _side(mask, kept)
    columns, column = _side(mask.t(), kept)
    return Lists(rows, columns, number[columns.others.long(), column].int(), line.int())


def _side(mask: Tensor, kept: int) -> tuple[Side, Tensor]:
    """The tiles line by line, and the line of each entry."""
    counts = mask.sum(1)
    ends = counts.cumsum(0)
    line, other = torch.nonzero_static(mask, size=kept).unbind(1)
    by = counts.argsort(descending=True, stable=True)
    turns = torch.stack([by, (ends - counts)[by], ends[by]], 1)
    return Side(other.int(), turns.int()), line
