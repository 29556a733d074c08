"""Autograd of tensors that are replicated on, or dealt out over, the ranks of a group.

Every method's input and output are replicated: each rank gets the same x and dY. So

    replicate(x)      forward: x                  backward: sum of the ranks' dx
    sum_partials(y)   forward: sum of partials    backward: dY, as it is
    take_columns(x)   forward: this rank's columns of x   backward: gather of all ranks' columns
    join_columns(y)   forward: gather of columns          backward: this rank's columns of dY

(the conjugate pairs f, g of Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053, section 3). No
caller scales anything: a dense layer computed by all ranks together counts once.

The bias is added once, in the float32 sums of a product's epilogue: by the first rank where
partials are summed, by each rank for its own columns where columns are joined. Added after the sum
over ranks it would cost another rounding of Y, √3 in place of √2 of plain dense's error, and
another pass over Y. The product gets it detached; its gradient Σ dY is given at the sum or join,
on every rank.
"""

import torch
from torch import Tensor

from blockshock.distributed import reduce


def replicate(x: Tensor, group=None) -> Tensor:
    """x [B, K] used whole by every rank; its gradient is the sum over the ranks.

    The sum overwrites the gradient that arrives, so the one consumer of the result must be a
    product, whose backward makes a fresh tensor.
    """
    return _Replicate.apply(x, group)


def sum_partials(partial: Tensor, bias: Tensor | None = None, group=None) -> Tensor:
    """The sum over the ranks of partial [B, N]; overwrites it. The gradient passes unchanged.

    bias [N]: what `bias_of_first` gave the product; here it gets its gradient.
    """
    return _SumPartials.apply(partial, bias, group)


def bias_of_first(bias: Tensor | None, group=None) -> Tensor | None:
    """The bias for the product of the group's first rank, None for the others."""
    return bias.detach() if bias is not None and reduce.group_rank(group) == 0 else None


def take_columns(x: Tensor, columns: Tensor | None, group=None) -> Tensor:
    """This rank's columns of x [B, K] -> [B, K/ranks].

    columns [ranks, K/ranks] int64 says which; None deals out contiguous slices.
    """
    return _TakeColumns.apply(x, columns, group)


def join_columns(part: Tensor, bias: Tensor | None = None, group=None) -> Tensor:
    """The ranks' column slices [B, N/ranks] side by side -> [B, N].

    bias [N]: its slice `bias_of_own` went into the product; here it gets its gradient.
    """
    return _JoinColumns.apply(part, bias, group)


def bias_of_own(bias: Tensor | None, group=None) -> Tensor | None:
    """This rank's slice of the bias, for its product."""
    return (
        None
        if bias is None
        else bias.detach().chunk(reduce.group_size(group))[reduce.group_rank(group)]
    )


def _own(x: Tensor, columns: Tensor | None, group) -> Tensor:
    rank, ranks = reduce.group_rank(group), reduce.group_size(group)
    if columns is not None:
        return x.index_select(1, columns[rank])
    width = x.shape[1] // ranks
    return x[:, rank * width : (rank + 1) * width]


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return reduce.all_reduce(dx, ctx.group), None


class _SumPartials(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, bias, group):
        total = reduce.all_reduce(partial, group)
        if total is partial:  # it is a copy when the layout had to be fixed
            ctx.mark_dirty(partial)
        return total

    @staticmethod
    def backward(ctx, dy):
        return dy, _bias_gradient(ctx, dy), None


class _TakeColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, columns, group):
        ctx.columns, ctx.group = columns, group
        return _own(x, columns, group)

    @staticmethod
    def backward(ctx, dx):
        return reduce.interleave(reduce.all_gather(dx, ctx.group), ctx.columns), None, None


class _JoinColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, bias, group):
        ctx.group = group
        return reduce.interleave(reduce.all_gather(part, group), None)

    @staticmethod
    def backward(ctx, dy):
        return _own(dy, None, ctx.group), _bias_gradient(ctx, dy), None


def _bias_gradient(ctx, dy: Tensor) -> Tensor | None:
    return dy.sum(0) if ctx.needs_input_grad[1] else None
