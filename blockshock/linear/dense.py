"""The ordinary ways to compute Y = X Wᵀ (+ b): on one GPU, and split over a group of R ranks.

    dense_single      every rank holds W and computes the whole product
    dense_tp_row      columns of W dealt out:   Y = Σ_r X[:, k_r] W[:, k_r]ᵀ      one all-reduce
                      dX = concat_r dY W[:, k_r]                                  one all-gather
    dense_tp_column   rows of W dealt out:      Y = concat_r X W[n_r, :]ᵀ         one all-gather
                      dX = Σ_r dY[:, n_r] W[n_r, :]                               one all-reduce

(row- and column-parallel linear layers of Megatron-LM, arXiv:1909.08053.) Input and output are
replicated, so the gather that a sharded neighbour would save is paid here by every method alike.
x_k, w_n: sharded along K or N.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from blockshock import sources
from blockshock.distributed import functions, reduce
from blockshock.linear import parts
from blockshock.measure.floor import Cost, all_gather_wire, all_reduce_wire, product_cost

POLICIES = {"frozen": {}, "plain": {}}  # how a dense weight can be trained: not at all, or as it is


class DenseSingle(nn.Module):
    """The dense layer, whole on every rank. weight [N, K], bias [N]."""

    masks = ()
    policies = POLICIES

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = parts.bias_parameter(bias)

    @staticmethod
    def unsupported(N, K, *, dtype, device_type, ranks, mask=None) -> str | None:
        """Why this method cannot run, or None when it can."""
        return None

    @classmethod
    def from_dense(cls, weight, bias=None, *, group=None) -> "DenseSingle":
        """weight: a tensor [N, K] or a weight source; bias [N] or None."""
        source = sources.as_source(weight)
        return cls(parts.take_columns(source), bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        flat = parts.flatten(x, self.weight.shape[1], self.weight)
        return F.linear(flat, self.weight, self.bias).view(*x.shape[:-1], self.weight.shape[0])

    def to_dense(self) -> Tensor:
        """The weight [N, K]."""
        return self.weight.detach().clone()

    def restrict(self, source) -> dict[str, Tensor]:
        """What this rank's parameters would be for another dense [N, K]; see CONTRIBUTING.md."""
        return {"weight": parts.take_columns(source)}

    def cost(self, batch: int) -> Cost:
        """Per rank, one forward product."""
        N, K = self.weight.shape
        size = self.weight.element_size()
        return product_cost(batch, N, K, size)


class DenseTPRow(nn.Module):
    """Row-parallel: this rank's columns w_k [N, K/R]; the partial products are summed."""

    masks = ()
    policies = POLICIES

    def __init__(self, weight: Tensor, bias: Tensor | None, group):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = parts.bias_parameter(bias)
        self.group = group
        self.ranks = reduce.group_size(group)

    @staticmethod
    def unsupported(N, K, *, dtype, device_type, ranks, mask=None) -> str | None:
        """Why this method cannot run, or None when it can."""
        return parts.even_unsupported("K", K, ranks)

    @classmethod
    def from_dense(cls, weight, bias=None, *, group=None) -> "DenseTPRow":
        """weight: a tensor [N, K] or a weight source, K a multiple of the ranks; bias [N]."""
        source = sources.as_source(weight)
        reason = parts.even_unsupported("K", source.shape[1], reduce.group_size(group))
        if reason:
            raise ValueError(reason)
        return cls(_own_columns(source, group), bias, group)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], the same bits on every rank."""
        flat = parts.flatten(x, self.weight.shape[1] * self.ranks, self.weight)
        x_k = functions.take_columns(flat, None, self.group)
        partial = F.linear(x_k, self.weight, functions.bias_of_first(self.bias, self.group))
        y = functions.sum_partials(partial, self.bias, self.group)
        return y.view(*x.shape[:-1], y.shape[-1])

    def to_dense(self) -> Tensor:
        """The weight [N, K] on every rank."""
        N, width = self.weight.shape
        start = reduce.group_rank(self.group) * width

        def place(full):
            full[:, start : start + width] = self.weight

        return parts.assemble(place, (N, width * self.ranks), self.weight, self.group)

    def restrict(self, source) -> dict[str, Tensor]:
        """What this rank's parameters would be for another dense [N, K]."""
        return {"weight": _own_columns(source, self.group)}

    def cost(self, batch: int) -> Cost:
        """Per rank, one forward product."""
        N, width = self.weight.shape
        size = self.weight.element_size()
        return product_cost(
            batch,
            N,
            width,
            size,
            wire_forward=all_reduce_wire(batch * N * size, self.ranks),
            wire_backward=all_gather_wire(batch * width * self.ranks * size, self.ranks),
        )


class DenseTPColumn(nn.Module):
    """Column-parallel: this rank's rows w_n [N/R, K]; the slices of the output are gathered."""

    masks = ()
    policies = POLICIES

    def __init__(self, weight: Tensor, bias: Tensor | None, group):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = parts.bias_parameter(bias)
        self.group = group
        self.ranks = reduce.group_size(group)

    @staticmethod
    def unsupported(N, K, *, dtype, device_type, ranks, mask=None) -> str | None:
        """Why this method cannot run, or None when it can."""
        return parts.even_unsupported("N", N, ranks)

    @classmethod
    def from_dense(cls, weight, bias=None, *, group=None) -> "DenseTPColumn":
        """weight: a tensor [N, K] or a weight source, N a multiple of the ranks; bias [N]."""
        source = sources.as_source(weight)
        reason = parts.even_unsupported("N", source.shape[0], reduce.group_size(group))
        if reason:
            raise ValueError(reason)
        return cls(_own_rows(source, group), bias, group)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], the same bits on every rank."""
        flat = parts.flatten(x, self.weight.shape[1], self.weight)
        x_all = functions.replicate(flat, self.group)
        y_n = F.linear(x_all, self.weight, functions.bias_of_own(self.bias, self.group))
        y = functions.join_columns(y_n, self.bias, self.group)
        return y.view(*x.shape[:-1], y.shape[-1])

    def to_dense(self) -> Tensor:
        """The weight [N, K] on every rank."""
        return reduce.all_gather(self.weight.detach(), self.group).flatten(0, 1)

    def restrict(self, source) -> dict[str, Tensor]:
        """What this rank's parameters would be for another dense [N, K]."""
        return {"weight": _own_rows(source, self.group)}

    def cost(self, batch: int) -> Cost:
        """Per rank, one forward product."""
        height, K = self.weight.shape
        size = self.weight.element_size()
        return product_cost(
            batch,
            height,
            K,
            size,
            wire_forward=all_gather_wire(batch * height * self.ranks * size, self.ranks),
            wire_backward=all_reduce_wire(batch * K * size, self.ranks),
        )


def _own_columns(source, group) -> Tensor:
    width = source.shape[1] // reduce.group_size(group)
    start = reduce.group_rank(group) * width
    return parts.take_columns(source, slice(start, start + width))


def _own_rows(source, group) -> Tensor:
    height = source.shape[0] // reduce.group_size(group)
    start = reduce.group_rank(group) * height
    return parts.take_rows(source, start, start + height)
