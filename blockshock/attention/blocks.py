"""A pattern as kernels read it: for each block of queries the blocks of keys it touches, and back.

    plane p = b batch_stride + h head_stride: batch entries and heads that see alike share one
    entries starts[p, I] to starts[p, I + 1] of (keys, masks): the key blocks of query block I,
        the first full[p, I] of them full (masks -1), then the partial ones, each in rising order
    bits[masks[e], i, w] = Σ_j mask[i, 32 w + j] 2^j      the elements of a partial tile
    low_i <= j < high_i          instead of bits, where the pattern's rows are intervals

A tile is full where every query inside Tq sees each of its block_k keys, all inside Tk: a kernel
computes it without a mask, and needs none for rows beyond Tq, which it does not write. The backward
reads the same tiles from the other side: for each block of keys the query blocks that touch it.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass, fields
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from blockshock.attention import reads, rules, tiles
from blockshock.attention import turns as programs

KEPT = 16  # tables of one pattern


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Lists of touched tiles; nq = ⌈Tq / block_q⌉, nk = ⌈Tk / block_k⌉, P planes. See the module.

    Offsets into `bits` beyond 2^31 elements are possible: kernels count these in int64.
    """

    block_q: int
    block_k: int
    Tq: int
    Tk: int
    planes: int
    batch_stride: int
    head_stride: int
    starts: Tensor  # int32 [P, nq + 1], into keys and masks: offsets of all planes in one
    full: Tensor  # int32 [P, nq]
    keys: Tensor  # int32 [entries]
    masks: Tensor  # int32 [entries]; -1: full. 0 for each partial tile where there are intervals
    starts_t: Tensor  # int32 [P, nk + 1], into queries_t and masks_t
    full_t: Tensor  # int32 [P, nk]
    queries_t: Tensor  # int32 [entries]
    masks_t: Tensor  # int32 [entries]
    turns: Tensor  # what programs read of the lists, see `turns.py`
    splits: Tensor
    slots: int
    turns_t: Tensor
    splits_t: Tensor
    slots_t: int
    bits: Tensor  # int32 [unique, block_q, block_k // 32]; unique = 0 where there are intervals
    low: Tensor | None  # int32 [Tq]
    high: Tensor | None  # int32 [Tq]
    unseen_q: Tensor | None  # bool [P, Tq]: of touched tiles, seeing nothing; None: there are none
    unseen_k: Tensor | None  # bool [P, Tk]: of touched tiles, seen by nobody; None likewise
    touched: int  # tiles with at least one attended pair
    tiles: int  # all
    consecutive: bool  # intervals, and the touched ones of each list follow each other, both ways
    build_seconds: float
    stream: int = 0  # that it was made on; -1 for several

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(value.nbytes for value in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All of them."""
        values = [getattr(self, field.name) for field in fields(self)]
        return [value for value in values if isinstance(value, Tensor)]

    @property
    def touched_sparsity(self) -> float:
        """The share of tiles that nothing touches; 0 where there are no tiles."""
        return 1 - self.touched / self.tiles if self.tiles else 0.0

    @property
    def ideal_speedup(self) -> float:
        """What leaving out these tiles can give: tiles / touched; inf where nothing is touched."""
        return rules.ideal_speedup(self.touched_sparsity)


def table(
    pattern: rules.Pattern,
    Tq: int,
    Tk: int,
    *,
    batch: int = 1,
    heads: int = 1,
    block_q: int,
    block_k: int,
    device="cpu",
) -> BlockTable:
    """The table of a pattern: made once for these arguments, kept while the pattern lives.

    It is made anew when what the pattern's rule reads has changed (`reads.py`).

    Args:
        pattern: see `patterns.py`. The KEPT tables that were used last are kept for each.
        Tq, Tk: tokens, any number. batch, heads: of q; they count only where the pattern differs
            between them.
        block_q, block_k: the sides of a tile, multiples of 16 and of 32.
        device: where the table is made and lies.

    Raises:
        ValueError: sizes that the pattern does not fit; other blocks; a predicate that returns
            something else than a bool tensor; more tiles than int32 counts.
        RuntimeError: it would have to be made while a CUDA graph is captured.
    """
    rules.check(pattern, Tq, Tk, batch=batch, heads=heads)
    rules.at_least(1, block_q=block_q, block_k=block_k)
    for name, block, multiple in (("block_q", block_q, 16), ("block_k", block_k, 32)):
        if block % multiple:
            raise ValueError(f"{name} {block}: a multiple of {multiple} is needed, e.g. 64")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    rules.check_planes(pattern, (batch, heads, Tq, Tk), device)
    different = batch if pattern.per_batch else 1, heads if pattern.per_head else 1
    key = (Tq, Tk, *different, block_q, block_k, device)
    kept = reads.kept(pattern).setdefault("tables", OrderedDict())
    # Taken out and put back: the last one used is the last one in the order.
    found = kept.pop(key, None)
    # Tensors of inference mode could not be saved for a backward later.
    if found is None:
        refuse_in_capture(device)
        with torch.inference_mode(False), torch.no_grad():
            found = _build(pattern, Tq, Tk, different, block_q, block_k, device)
    kept[key] = found
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return found


_COUNT = itertools.count()
_NUMBERS: WeakKeyDictionary = WeakKeyDictionary()  # table -> its number
_NUMBERED: WeakValueDictionary = WeakValueDictionary()  # and back


def number(table: BlockTable) -> int:
    """A number that stands for a table in a compiled graph; no other table ever has it."""
    if table not in _NUMBERS:
        _NUMBERS[table] = next(_COUNT)
        _NUMBERED[_NUMBERS[table]] = table
    return _NUMBERS[table]


def numbered(number: int) -> BlockTable:
    """The table of a number; RuntimeError if it is no more."""
    if number not in _NUMBERED:
        raise RuntimeError(
            "the lists of this compiled attention are gone: what its pattern's rule reads has "
            "changed between forward and backward; change it after the backward"
        )
    return _NUMBERED[number]


def ready(table: BlockTable) -> BlockTable:
    """The table, once it is made: any stream may read it from here on."""
    if table.starts.is_cuda:
        torch.cuda.synchronize(table.starts.device)
    return table


def stream_of(device: torch.device) -> int:
    """The current stream there; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def refuse_in_capture(device: torch.device) -> None:
    """RuntimeError while a CUDA graph is captured: making lists reads numbers back."""
    if rules.captured(device):
        raise RuntimeError(
            "a CUDA graph is being captured, and the lists of this pattern are not made for these "
            "sizes; call block_sparse once with them before the capture"
        )


def dense(table: BlockTable, *, transposed: bool = False) -> Tensor:
    """The mask that the lists describe, bool [P, Tq, Tk]; from those of keys if transposed.

    The reference for kernels that read a table; as large as the mask, for small sizes.
    """
    t, device = table, table.starts.device
    nq, nk = tiles.blocks(t.Tq, t.block_q), tiles.blocks(t.Tk, t.block_k)
    starts, others, masks = t.starts, t.keys, t.masks
    if transposed:
        starts, others, masks = t.starts_t, t.queries_t, t.masks_t
    lines = starts.shape[1] - 1
    counts = starts.diff(dim=1).flatten().long()
    line = torch.arange(len(counts), device=device).repeat_interleave(counts)
    kinds = torch.full((t.planes, lines, nk if not transposed else nq), -2, device=device)
    kinds[line // max(lines, 1), line % max(lines, 1), others.long()] = masks.long()
    if transposed:
        kinds = kinds.mT
    shape = (t.planes, nq, t.block_q, nk, t.block_k)
    kinds = kinds[:, :, None, :, None].expand(shape)

    def crop(mask):
        return mask.reshape(t.planes, nq * t.block_q, nk * t.block_k)[:, : t.Tq, : t.Tk]

    full, partial = crop(kinds == -1), crop(kinds >= 0)
    if t.low is not None:
        key = torch.arange(t.Tk, device=device)
        return full | partial & (t.low[:, None] <= key) & (key < t.high[:, None])
    if not len(t.bits):
        return full
    bits = tiles.unpack(t.bits)[kinds[:, :, 0, :, 0].clamp(min=0)]  # [P, nq, nk, bq, bk]
    return full | partial & crop(bits.transpose(2, 3))


def _build(pattern, Tq, Tk, different, block_q, block_k, device) -> BlockTable:
    started = time.perf_counter()
    planes = different[0] * different[1]
    low = high = None
    if pattern.interval:
        low, high = rules.rows(pattern, Tq, Tk, device)
        made = tiles.of_intervals(low, high, Tk, block_q, block_k)
        low, high = low.int(), high.int()
    else:
        made = tiles.of_predicate(
            pattern,
            Tq,
            Tk,
            batch=different[0],
            heads=different[1],
            block_q=block_q,
            block_k=block_k,
            device=device,
        )
    nq, nk = tiles.blocks(Tq, block_q), tiles.blocks(Tk, block_k)
    of_queries = _lists(made, made.line, made.column, planes, nq, nk)
    plane, row = made.line // max(nq, 1), made.line % max(nq, 1)
    of_keys = _lists(made, plane * nk + made.column, row, planes, nk, nq)
    consecutive = pattern.interval is not None
    consecutive &= programs.are_consecutive(*of_queries[:3])
    consecutive &= programs.are_consecutive(*of_keys[:3])
    lists = both_sides(of_queries, of_keys, consecutive)
    return ready(
        BlockTable(
            block_q=block_q,
            block_k=block_k,
            Tq=Tq,
            Tk=Tk,
            planes=planes,
            batch_stride=(different[1] if pattern.per_batch else 0),
            head_stride=int(pattern.per_head),
            **lists,
            bits=made.bits,
            low=low,
            high=high,
            unseen_q=_unseen(made.sees, made.line, block_q),
            unseen_k=_unseen(made.seen, plane * nk + made.column, block_k),
            touched=len(made.line),
            tiles=planes * nq * nk,
            consecutive=consecutive,
            build_seconds=time.perf_counter() - started,
            stream=stream_of(device),
        )
    )


def _unseen(seen: Tensor, line: Tensor, block: int) -> Tensor | None:
    """Tokens of touched tiles, by their lines, that are not among those seen [P, T]."""
    planes, T = seen.shape
    touched = seen.new_zeros(planes, tiles.blocks(T, block))
    touched.view(-1)[line] = True
    found = touched.repeat_interleave(block, dim=1)[:, :T] & ~seen
    return found if found.any() else None


def _lists(made: tiles.Tiles, line: Tensor, other: Tensor, planes: int, lines: int, others: int):
    """starts, full, others, masks of the tiles, by `line` of all planes: int32."""
    device = line.device
    # Sorted by line, then full before partial, then the other side: bounds are found by search.
    key, by = ((2 * line + ~made.full) * others + other).sort()
    each = torch.arange(planes * lines + 1, device=device) * (2 * others)
    bounds = torch.searchsorted(key, each)
    full = (torch.searchsorted(key, each[:-1] + others) - bounds[:-1]).view(planes, lines)
    ends = torch.arange(planes, device=device)[:, None] * lines
    starts = bounds[ends + torch.arange(lines + 1, device=device)]
    return tuple(values.int() for values in (starts, full, other[by], made.mask[by]))


def both_sides(of_queries: tuple, of_keys: tuple, consecutive: bool) -> dict:
    """The fields of a table that list its tiles; a side is starts, full, others and masks."""
    turns = programs.turns(*of_queries[:3], consecutive=consecutive, together=False)
    turns_t = programs.turns(*of_keys[:3], consecutive=consecutive, together=True)
    lists = "starts", "full", "keys", "masks", "turns", "splits", "slots"
    lists_t = "starts_t", "full_t", "queries_t", "masks_t", "turns_t", "splits_t", "slots_t"
    sides = (*of_queries, *turns), (*of_keys, *turns_t)
    return dict(zip(lists, sides[0], strict=True)) | dict(zip(lists_t, sides[1], strict=True))
