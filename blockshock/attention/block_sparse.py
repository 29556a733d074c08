"""Attention that computes only the tiles a pattern touches, forward and backward.

    for each tile I of queries, over the tiles J of keys in its list:   as in `flash_triton`

The lists come from `blocks.table`: for each tile of queries the full tiles, which need no mask,
then the partial ones; and the same from the other side for dK and dV. A tile that holds no pair of
the pattern is not computed, and its keys and values are not read. Long lists are begun first, and
very long ones are worked on in pieces, so that uneven patterns keep all processors at work to the
end. Without a pattern the lists are those of a full, or causal, mask. (Block lists as in
FlexAttention, Dong et al. 2024, arXiv:2412.05496; patterns as in Longformer, arXiv:2004.05150, and
BigBird, arXiv:2007.14062.)
"""

import time
import weakref
from dataclasses import replace

import torch
from torch import Tensor

from blockshock.attention import blocks, patterns, rules, shapes, tiles
from blockshock.attention.flash_triton import attend, gradients, refused
from blockshock.kernels.dropout import Dropout
from blockshock.kernels.flash_plans import chosen

_IN_GRAPHS: set[blocks.BlockTable] = set()


def _hold(table: blocks.BlockTable) -> None:
    """Keeps the lists until the kernels that are about to be launched have read them.

    A graph keeps no reference to what it reads, and memory that is freed goes back to the stream
    that it was made on, whatever other streams still do.
    """
    device = table.starts.device
    if device.type != "cuda":
        return
    if rules.captured(device):
        _IN_GRAPHS.add(table)
        return
    stream = torch.cuda.current_stream(device)
    if stream.cuda_stream != table.stream:
        for x in table.tensors():
            x.record_stream(stream)


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, table, dropout):
        _hold(table)
        return attend(ctx, q, k, v, scale, table=table, dropout=dropout)

    @staticmethod
    def backward(ctx, d_out):
        _hold(ctx.options["table"])
        return *gradients(ctx, d_out), None, None, None


@torch.compiler.disable  # kernels of its own: a break in a compiled graph
def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    pattern=None,
    scale=None,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
) -> Tensor:
    """softmax(scale · Q Kᵀ) V over the pairs of a pattern; see `blockshock.attention` for shapes.

    dropout: each weight of the softmax is set to zero with this probability and the others are
    divided by 1 − dropout; the same seed drops the same weights, forward and backward.

    seed: a number from 0 to 2^63 − 1, or an int64 tensor of one element on the device of q. A
    tensor is read by the forward, so a CUDA graph that advances it (`seed.add_(1)`) drops other
    weights at each replay; the backward drops what its forward dropped. Activation checkpointing
    runs the forward again: advance the seed after the backward there.

    Raises:
        ValueError: what the kernels cannot take.
        RuntimeError: a CUDA graph is being captured, and the lists of the pattern for these sizes
            are not made yet (those that a graph reads are kept from then on), or the seed of a
            dropout is a number, so that each replay would drop the same weights.
    """
    lists = _table(q, k, v, causal, pattern, scale)
    return _attend(q, k, v, scale, lists, _dropout(q, dropout, seed))


def _attend(q, k, v, scale, lists: blocks.BlockTable, dropout: Dropout) -> Tensor:
    """Keys that nobody sees, and queries that see nothing, may hold NaN: zeros are multiplied."""
    rows = _unseen(lists.unseen_q, lists, q)
    keys = _unseen(lists.unseen_k, lists, q, q.shape[1] // max(k.shape[1], 1))
    q = q if rows is None else q.masked_fill(rows, 0)
    k, v = (x if keys is None else x.masked_fill(keys, 0) for x in (k, v))
    out = _BlockSparse.apply(q, k, v, scale, lists, dropout)
    return out if rows is None else out.masked_fill(rows, 0)


def _unseen(tokens: Tensor | None, lists, q: Tensor, group: int = 1) -> Tensor | None:
    """[planes, T] as a mask of [batch, heads / group, T, D]."""
    if tokens is None:
        return None
    batch = len(q) if lists.batch_stride else 1
    if lists.head_stride:
        return tokens.view(batch, -1, group, tokens.shape[1]).all(2).unsqueeze(-1)
    return tokens.view(batch, 1, -1, 1)


def _dropout(q: Tensor, rate: float, seed: int | Tensor) -> Dropout:
    made = Dropout(rate, seed)
    if not rate:
        return Dropout()
    if isinstance(seed, Tensor):
        if seed.device != q.device:
            raise ValueError(
                f"seed on {seed.device}, q on {q.device}: one device is needed; move the seed"
            )
        return Dropout(rate, seed.clone())  # the backward reads what the forward read
    if rules.captured(q.device):
        raise RuntimeError(
            f"a CUDA graph is being captured, and seed = {seed} is a number: each replay would "
            "drop the same weights; give the seed as an int64 tensor of one element on the device, "
            "and advance it in the graph (seed.add_(1))"
        )
    return made


@torch.compiler.disable
def block_sparse_unpruned(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool | str = False, pattern=None, scale=None
) -> Tensor:
    """The ablation: the same kernels and masks, and all tiles are computed."""
    lists = unpruned(_table(q, k, v, causal, pattern, scale))
    return _attend(q, k, v, scale, lists, Dropout())


def table(shape: shapes.Shape, dtype, causal: bool | str, pattern, device) -> blocks.BlockTable:
    """The lists that `block_sparse` uses for these sizes."""
    sizes = (shape.batch, shape.heads, shape.Tq, shape.D)
    tile = chosen(sizes, dtype, listed=True).forward  # its tile is that of all
    shift = shapes.causal_shift(causal, shape.Tq, shape.Tk)
    rows = patterns.full() if shift is None else patterns.causal(shift)
    if pattern is None:
        pattern = rows
    elif shift is not None:
        pattern = patterns.both(pattern, rows)
    return blocks.table(
        pattern,
        shape.Tq,
        shape.Tk,
        batch=shape.batch,
        heads=shape.heads,
        block_q=tile.M,
        block_k=tile.N,
        device=device,
    )


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


def _table(q: Tensor, k: Tensor, v: Tensor, causal: bool, pattern, scale) -> blocks.BlockTable:
    shape = shapes.check(q, k, v, pattern=pattern, scale=scale)
    reason = refused(shape, dtype=q.dtype, device_type=q.device.type, scale=scale)
    if reason:
        raise ValueError(reason)
    return table(shape, q.dtype, causal, pattern, q.device)


def _unsupported(shape, *, dtype, device_type, causal, pattern, scale, backward) -> str | None:
    return refused(shape, dtype=dtype, device_type=device_type, scale=scale)


for _method in (block_sparse, block_sparse_unpruned):
    _method.unsupported = _unsupported
block_sparse.table = table
block_sparse_unpruned.table = lambda *sizes: unpruned(table(*sizes))
