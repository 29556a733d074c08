"""Lists of all tiles, for the ablation of `block_sparse`: what leaving tiles out saves."""

import time
import weakref
from dataclasses import replace

import torch
from torch import Tensor

from blockshock.attention import blocks, tiles

_UNPRUNED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def unpruned(pruned: blocks.BlockTable) -> blocks.BlockTable:
    """The table with all tiles listed; those that it does not list are partial, without a pair."""
    if pruned not in _UNPRUNED:
        blocks.refuse_in_capture(pruned.starts.device)
        with torch.inference_mode(False), torch.no_grad():
            _UNPRUNED[pruned] = _with_all(pruned)
    return _UNPRUNED[pruned]


def _with_all(pruned: blocks.BlockTable) -> blocks.BlockTable:
    started, stream = time.perf_counter(), blocks.stream_of(pruned.starts.device)
    planes, device = pruned.planes, pruned.starts.device
    nq, nk = pruned.starts.shape[1] - 1, pruned.starts_t.shape[1] - 1
    tiles.check_total(planes * nq * nk, pruned.block_q, pruned.block_k)
    empty = len(pruned.bits)  # the mask of a tile without a pair, put behind the others
    kinds = torch.full((planes * nq, nk), 0 if pruned.low is not None else empty, device=device)
    counts = pruned.starts.diff(dim=1).flatten().long()
    line = torch.arange(len(counts), device=device).repeat_interleave(counts)
    kinds[line, pruned.keys.long()] = pruned.masks.long()
    kinds = kinds.view(planes, nq, nk)
    bits = pruned.bits
    if pruned.low is None:
        bits = torch.cat([bits, bits.new_zeros(1, *bits.shape[1:])])
    listed = blocks.both_sides(_all_of(kinds), _all_of(kinds.mT), pruned.consecutive)
    return blocks.ready(
        replace(
            pruned,
            **listed,
            bits=bits,
            touched=planes * nq * nk,
            build_seconds=pruned.build_seconds + time.perf_counter() - started,
            stream=stream if stream == pruned.stream else -1,
        )
    )


def _all_of(kinds: Tensor) -> tuple[Tensor, ...]:
    """starts, full, others, masks of [planes, lines, others] kinds, −1 for full tiles."""
    planes, lines, others = kinds.shape
    order_of_each = (kinds != -1).int().argsort(dim=2, stable=True)
    each = torch.arange(planes, device=kinds.device)[:, None] * (lines * others)
    starts = each + torch.arange(lines + 1, device=kinds.device) * others
    full = (kinds == -1).sum(2)
    listed = (starts, full, order_of_each.flatten(), kinds.gather(2, order_of_each).flatten())
    return tuple(values.int() for values in listed)
