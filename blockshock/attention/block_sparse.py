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

import torch
from torch import Tensor

from blockshock.attention import blocks, operators, patterns, rules, shapes
from blockshock.attention.flash_triton import attend, gradients, refused
from blockshock.attention.unpruned import unpruned
from blockshock.kernels import flash
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
    return _run(q, k, v, causal, pattern, scale, False, dropout, seed)


def block_sparse_unpruned(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool | str = False, pattern=None, scale=None
) -> Tensor:
    """The ablation: the same kernels and masks, and all tiles are computed."""
    return _run(q, k, v, causal, pattern, scale, True, 0.0, 0)


def _run(q, k, v, causal, pattern, scale, whole: bool, rate: float, seed: int | Tensor) -> Tensor:
    shape = shapes.check(q, k, v, pattern=pattern, scale=scale)
    reason = refused(shape, dtype=q.dtype, device_type=q.device.type, scale=scale)
    if reason:
        raise ValueError(reason)
    shift = shapes.causal_shift(causal, shape.Tq, shape.Tk)
    if torch.compiler.is_compiling():
        scale = shape.D**-0.5 if scale is None else float(scale)
        number = -1 if pattern is None else pattern.number
        place, seed = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
        return _forward(q, k, v, place, scale, shift, number, whole, rate, seed)[0]
    lists = _lists(shape, q.dtype, shift, pattern, q.device)
    return _attend(q, k, v, scale, unpruned(lists) if whole else lists, _dropout(q, rate, seed))


def _attend(q, k, v, scale, lists: blocks.BlockTable, dropout: Dropout) -> Tensor:
    q, k, v, rows = _cleaned(q, k, v, lists)
    out = _BlockSparse.apply(q, k, v, scale, lists, dropout)
    return out if rows is None else out.masked_fill(rows, 0)


def _cleaned(q: Tensor, k: Tensor, v: Tensor, lists: blocks.BlockTable) -> tuple:
    """q, k, v with zeros in what takes no part and may hold NaN; a mask of the queries, or None."""
    rows = _unseen(lists.unseen_q, lists, q)
    keys = _unseen(lists.unseen_k, lists, q, q.shape[1] // max(k.shape[1], 1))
    q = q if rows is None else q.masked_fill(rows, 0)
    k, v = (x if keys is None else x.masked_fill(keys, 0) for x in (k, v))
    return q, k, v, rows


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


def table(shape: shapes.Shape, dtype, causal: bool | str, pattern, device) -> blocks.BlockTable:
    """The lists that `block_sparse` uses for these sizes."""
    shift = shapes.causal_shift(causal, shape.Tq, shape.Tk)
    return _lists(shape, dtype, shift, pattern, device)


def _lists(shape: shapes.Shape, dtype, shift: int | None, pattern, device) -> blocks.BlockTable:
    sizes = (shape.batch, shape.heads, shape.Tq, shape.D)
    tile = chosen(sizes, dtype, listed=True).forward  # its tile is that of all
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


# The same as one operator, for a compiler: a graph holds numbers in place of a pattern and lists.


@torch.library.custom_op("blockshock::block_sparse_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Tensor | None,
    scale: float,
    shift: int | None,
    pattern: int,
    whole: bool,
    rate: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the number of the lists. pattern: its number, or −1; place: a seed, or None."""
    rule = None if pattern < 0 else rules.numbered(pattern)
    lists = _lists(shapes.Shape.of(q.shape, k.shape), q.dtype, shift, rule, q.device)
    lists = unpruned(lists) if whole else lists
    dropout = _dropout(q, rate, seed if place is None else place)
    q, k, v, _ = _cleaned(q, k, v, lists)
    _hold(lists)
    out, lse = flash.forward(q, k, v, scale=scale, table=lists, dropout=dropout)
    return out, lse, torch.tensor(blocks.number(lists))


@_forward.register_fake
def _(q, k, v, place, scale, shift, pattern, whole, rate, seed):
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    return operators.made_like(q), lse, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("blockshock::block_sparse_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
    place: Tensor | None,
    d_out: Tensor,
    scale: float,
    rate: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    table = blocks.numbered(int(lists))
    dropout = _dropout(q, rate, seed if place is None else place)
    q, k, v, rows = _cleaned(q, k, v, table)
    d_out = d_out if rows is None else d_out.masked_fill(rows, 0)
    _hold(table)
    return flash.backward(q, k, v, out, lse, d_out, scale=scale, table=table, dropout=dropout)


@_backward.register_fake
def _(q, k, v, out, lse, lists, place, d_out, scale, rate, seed):
    return tuple(operators.made_like(x) for x in (q, k, v))


def _setup(ctx, inputs, output):
    q, k, v, place, scale, _, _, _, rate, seed = inputs
    ctx.save_for_backward(q, k, v, *output, place)
    ctx.numbers = scale, rate, seed


def _gradients(ctx, d_out, *_):
    return *_backward(*ctx.saved_tensors, d_out, *ctx.numbers), *(None,) * 7


_forward.register_autograd(_gradients, setup_context=_setup)


def _unsupported(shape, *, dtype, device_type, causal, pattern, scale, backward) -> str | None:
    return refused(shape, dtype=dtype, device_type=device_type, scale=scale)


for _method in (block_sparse, block_sparse_unpruned):
    _method.unsupported = _unsupported
block_sparse.table = table
block_sparse_unpruned.table = lambda *sizes: unpruned(table(*sizes))
