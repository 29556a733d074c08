"""The tiles of a mask: which ones a pattern touches, which are full, and the bits of the others.

    tile (I, J) of a mask [Tq, Tk]: rows I bq to (I + 1) bq, columns J bk to (J + 1) bk
    touched: some pair inside attends       full: every row inside Tq sees all bk keys
    words[i, w] = Σ_j mask[i, 32 w + j] 2^j     one int32 for 32 keys; 0 beyond Tq and Tk

From intervals [low, high) a row touches tiles low // bk to ⌈high / bk⌉ and fills ⌈low / bk⌉ to
high // bk: a block touches the union over its rows and fills their intersection, so no pair is
looked at. Any other pattern is evaluated chunk by chunk, and equal bits of tiles are kept once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from blockshock.attention import rules

MOST = 2**31 - 1  # entries of a list: kernels count them in int32
_MAGIC = 0x0102040810204080  # gathers bit 8i of a word in bit 56 + i, without carries
_MIX_A, _MIX_B = 0x1CE4E5B9BF58476D, 0x133111EB94D049BB  # odd


@dataclass(frozen=True, eq=False)
class Tiles:
    """E touched tiles, int64 [E] each but full; line = p nq + I in plane p, column = J."""

    line: Tensor
    column: Tensor
    full: Tensor  # bool
    mask: Tensor  # which bits; -1 for full tiles
    bits: Tensor  # int32 [unique, block_q, block_k // 32]
    sees: Tensor  # bool [planes, Tq]: whether a query sees any key
    seen: Tensor  # bool [planes, Tk]: whether any query sees a key


def blocks(length: int, block: int) -> int:
    """How many blocks cover a length; the last may stick out."""
    return -(-length // block)


def of_intervals(low: Tensor, high: Tensor, Tk: int, block_q: int, block_k: int) -> Tiles:
    """The tiles of intervals, int64 [Tq], 0 <= low <= high <= Tk. No bits: mask is 0 where partial.

    O(Tq + E). Raises ValueError for more than MOST tiles, before there is memory for them.
    """
    Tq, device = len(low), low.device
    nq = blocks(Tq, block_q)

    def by_block(values, beyond):
        filled = torch.full((nq * block_q,), beyond, dtype=torch.int64, device=device)
        filled[:Tq] = values
        return filled.view(nq, block_q)

    first_full = by_block((low + block_k - 1) // block_k, 0).amax(1)
    end_full = by_block(high // block_k, Tk // block_k).amin(1)
    # Ranges in the order of their first tile: each adds what those before it did not reach.
    some = low < high
    first, order = by_block(torch.where(some, low // block_k, 0), 0).sort(dim=1)
    end = by_block(torch.where(some, (high + block_k - 1) // block_k, 0), 0).gather(1, order)
    reached = torch.zeros_like(end)
    reached[:, 1:] = end.cummax(dim=1).values[:, :-1]
    first = torch.maximum(first, reached).flatten()
    counts = (end.flatten() - first).clamp(min=0)
    total = int(counts.sum())
    check_total(total, block_q, block_k)
    ranges = torch.arange(len(counts), device=device)
    row = ranges.repeat_interleave(counts, output_size=total)
    column = first[row] + torch.arange(total, device=device) - (counts.cumsum(0) - counts)[row]
    line = row // block_q
    full = (first_full[line] <= column) & (column < end_full[line])
    bits = torch.empty(0, block_q, block_k // 32, dtype=torch.int32, device=device)
    steps = torch.zeros(Tk + 1, dtype=torch.int64, device=device)
    steps.index_add_(0, low, some.long()).index_add_(0, high, -some.long())
    seen = steps.cumsum(0)[:Tk] > 0
    return Tiles(line, column, full, -full.long(), bits, some[None], seen[None])


def of_predicate(
    pattern: rules.Pattern,
    Tq: int,
    Tk: int,
    *,
    batch: int,
    heads: int,
    block_q: int,
    block_k: int,
    device,
) -> Tiles:
    """The tiles of any pattern, evaluated on `batch` x `heads` planes, plane = b heads + h.

    No more than a chunk (`rules.CHUNK`) of pairs is held at once, and no more tiles of bits than a
    few times those that differ. Raises ValueError for more than MOST tiles.
    """
    nq, nk, width = blocks(Tq, block_q), blocks(Tk, block_k), block_k // 32
    tile, chunk = block_q * block_k, rules.chunk_of(device)
    across = min(max(nk, 1), max(1, chunk // tile))
    down = max(1, chunk // (tile * across))
    at_batch, at_head, query, key = (torch.arange(n, device=device) for n in (batch, heads, Tq, Tk))
    empty = torch.empty(0, dtype=torch.int64, device=device)
    lines, columns, fulls, masks = [empty], [empty], [empty.bool()], [empty]
    bits = [empty.int().view(0, block_q * width)]  # those that masks count through, in this order
    sees = torch.zeros(batch * heads, Tq, dtype=torch.bool, device=device)
    seen = torch.zeros(batch * heads, Tk, dtype=torch.bool, device=device)
    total = held = settled = 0  # tiles; rows of bits; rows of bits[0]
    corners = itertools.product(range(batch * heads), range(0, nq, down), range(0, nk, across))
    for plane, top, left in corners:
        b, h = divmod(plane, heads)
        rows = query[top * block_q : (top + down) * block_q, None]
        keys = key[left * block_k : (left + across) * block_k]
        attends = rules.evaluate(pattern, at_batch[b], at_head[h], rows, keys)
        sees[plane, top * block_q : (top + down) * block_q] |= attends.any(1)
        seen[plane, left * block_k : (left + across) * block_k] |= attends.any(0)
        words = _words(attends, block_q, block_k)
        line, column = (words != 0).any(dim=(1, 3)).nonzero().unbind(1)
        total += len(line)
        check_total(total, block_q, block_k)
        beyond = torch.arange(len(words) * block_q, device=device) >= len(rows)
        whole = ((words == -1) | beyond.view(-1, block_q, 1, 1)).all(dim=(1, 3))
        full = whole[line, column]
        partial = (~full).nonzero().squeeze(1)
        mask = torch.full_like(line, -1)
        found = words[line[partial], :, column[partial]].flatten(1)
        found, mask[partial] = distinct(found)
        lines.append(line + (plane * nq + top))
        columns.append(column + left)
        fulls.append(full)
        masks.append(torch.where(full, -1, mask + held))
        bits.append(found)
        held += len(found)
        if held > 2 * settled + chunk // 32 // width // block_q:
            _settle(bits, masks)
            held = settled = len(bits[0])
    _settle(bits, masks)
    return Tiles(
        torch.cat(lines),
        torch.cat(columns),
        torch.cat(fulls),
        masks[0],
        bits[0].view(-1, block_q, width),
        sees,
        seen,
    )


def _settle(bits: list[Tensor], masks: list[Tensor]) -> None:
    """Leaves one piece of each, without rows of bits that were found in several chunks."""
    unique, index = distinct(torch.cat(bits))
    mask = torch.cat(masks)
    known = mask.clamp(min=0)
    masks[:] = [torch.where(mask < 0, mask, index[known]) if len(index) else mask]
    bits[:] = [unique]


def _words(attends: Tensor, block_q: int, block_k: int) -> Tensor:
    """bool [n, m] -> int32 [⌈n / bq⌉, bq, ⌈m / bk⌉, bk / 32], zero beyond n and m."""
    n, m = attends.shape
    height, width = blocks(n, block_q), blocks(m, block_k)
    mask = attends.new_zeros(height * block_q, width * block_k)
    mask[:n, :m] = attends
    return pack(mask).view(height, block_q, width, block_k // 32)


def pack(mask: Tensor) -> Tensor:
    """bool [..., 32 n] -> int32 [..., n]: bit j of a word is element j of its 32."""
    eights = mask.contiguous().view(torch.int64)  # bytes of 0 and 1, the first one lowest
    return (eights * _MAGIC >> 56).to(torch.uint8).view(torch.int32)


def unpack(words: Tensor) -> Tensor:
    """int32 [..., n] -> bool [..., 32 n]: pack, undone."""
    bit = torch.arange(32, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> bit & 1).bool().flatten(-2)


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """unique [U, n] in the order of first appearance, index [L]: rows [L, n] = unique[index].

    int32, n even. Rows are told apart by a hash, then compared with what they were taken for.
    """
    if not len(rows):
        return rows, torch.empty(0, dtype=torch.int64, device=rows.device)
    piece = max(1, (1 << 22) // rows.shape[1])  # rows looked at in one go
    hashes, order = torch.cat([_hash(some) for some in rows.split(piece)]).sort(stable=True)
    starts = torch.ones_like(hashes, dtype=torch.bool)
    starts[1:] = hashes[1:] != hashes[:-1]
    first, by = order[starts].sort()
    rank, index = torch.empty_like(by), torch.empty_like(order)
    rank[by] = torch.arange(len(by), device=by.device)
    index[order] = rank[starts.cumsum(0) - 1]
    unique = rows[first]
    pieces = zip(rows.split(piece), index.split(piece), strict=True)
    same = [(unique[i] == some).all() for some, i in pieces]
    if bool(torch.stack(same).all()):
        return unique, index
    return torch.unique(rows, dim=0, return_inverse=True)


def _hash(rows: Tensor) -> Tensor:
    """int64 [L] of int32 [L, n], n even: the sum of a mix of each pair of words and its place."""
    pairs = rows.contiguous().view(torch.int64)
    place = torch.arange(1, pairs.shape[1] + 1, device=rows.device) * _MIX_A
    mixed = (pairs ^ place) * _MIX_B
    mixed = (mixed ^ (mixed >> 32)) * _MIX_A
    return (mixed ^ (mixed >> 29)).sum(1)


def check_total(total: int, block_q: int, block_k: int) -> None:
    """ValueError for more than MOST tiles."""
    if total > MOST:
        raise ValueError(
            f"{total} tiles of {block_q} x {block_k} are touched: offsets are int32, so at most "
            f"{MOST}; use larger blocks, or fewer batch entries or heads at once"
        )
