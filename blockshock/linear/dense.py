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
from blockshock.distributed import collectives, functions, joins
from blockshock.distributed.joins import Gather, Sum
from blockshock.linear import parts, ways
from blockshock.linear.split import Split
from blockshock.measure.floor import Cost, all_gather_wire, all_reduce_wire, product_cost

REDUCES = ("collective", "auto", "two_shot", "exchange")  # the first is what users run today
POLICIES = {"frozen": {}, "plain": {}}  # how a dense weight can be trained: not at all, or as it is


class DenseSingle(nn.Module):
    """The dense layer, whole on every rank. weight [N, K], bias [N]."""

    method = "dense_single"
    masks = ()
    policies = POLICIES

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.out_features, self.in_features = weight.shape

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
        return parts.unflatten(F.linear(flat, self.weight, self.bias), x)

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


class DenseTPRow(Split):
    """Row-parallel: this rank's columns w_k [N, K/R]; the partial products are summed."""

    method = "dense_tp_row"
    masks = ()
    reduces = REDUCES
    policies = POLICIES

    def __init__(self, weight: Tensor, bias: Tensor | None, group, how: str):
        (N, width), ranks = weight.shape, collectives.group_size(group)
        super().__init__(weight, bias, N, width * ranks, group)
        self.start = width * self.rank
        self.output = Sum(how, N, group)
        self.input = Gather(how, self.in_features, joins.side_by_side, group)

    @staticmethod
    def unsupported(
        N, K, *, dtype, device_type, ranks, mask=None, reduce="collective"
    ) -> str | None:
        """Why this method cannot run, or None when it can."""
        return parts.even_unsupported("K", K, ranks) or parts.reduce_unsupported(
            reduce, dtype, device_type
        )

    @classmethod
    def from_dense(cls, weight, bias=None, *, group=None, reduce="collective") -> "DenseTPRow":
        """weight: a tensor [N, K] or a weight source, K a multiple of the ranks; bias [N].

        reduce: a name in `distributed.reduce.SUMS`.
        """
        source = parts.checked(cls, weight, group, reduce=reduce)
        return cls(_own_columns(source, group), bias, group, reduce)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], the same bits on every rank."""
        return parts.apply(self, x)

    def local_input(self, x: Tensor) -> Tensor:
        """This rank's columns x_k [B, K/R]."""
        return x[:, self.start : self.start + self.weight.shape[1]]

    def product(self, x_k: Tensor) -> Tensor:
        """X[:, k_r] w_kᵀ -> [rows, N]."""
        return F.linear(x_k, self.part, functions.bias_of_first(self))

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dY w_k -> [B, K/R]."""
        return dy @ self.part

    def weight_gradient(self, dy: Tensor, x_k: Tensor) -> Tensor:
        """dYᵀ X[:, k_r] -> [N, K/R]."""
        return dy.t() @ x_k

    def to_dense(self) -> Tensor:
        """The weight [N, K] on every rank."""
        N, width = self.weight.shape

        def place(full):
            full[:, self.start : self.start + width] = self.part

        return parts.assemble(place, (N, self.in_features), self.part, self.group)

    def restrict(self, source) -> dict[str, Tensor]:
        """What this rank's parameters would be for another dense [N, K]."""
        return {"weight": _own_columns(source, self.group)}

    def paths(self, batch: int) -> dict[str, str]:
        """How the results of the ranks are joined."""
        return ways.paths(self, batch)

    def cost(self, batch: int) -> Cost:
        """Per rank, one forward product."""
        return parts.row_cost(self, batch, self.weight.shape[1])


class DenseTPColumn(Split):
    """Column-parallel: this rank's rows w_n [N/R, K]; the slices of the output are gathered."""

    method = "dense_tp_column"
    masks = ()
    reduces = REDUCES
    policies = POLICIES

    def __init__(self, weight: Tensor, bias: Tensor | None, group, how: str):
        (height, K), ranks = weight.shape, collectives.group_size(group)
        super().__init__(weight, bias, height * ranks, K, group)
        self.rows = slice(height * self.rank, height * (self.rank + 1))
        self.output = Gather(how, self.out_features, joins.side_by_side, group)
        self.input = Sum(how, K, group)

    @staticmethod
    def unsupported(
        N, K, *, dtype, device_type, ranks, mask=None, reduce="collective"
    ) -> str | None:
        """Why this method cannot run, or None when it can."""
        return parts.even_unsupported("N", N, ranks) or parts.reduce_unsupported(
            reduce, dtype, device_type
        )

    @classmethod
    def from_dense(cls, weight, bias=None, *, group=None, reduce="collective") -> "DenseTPColumn":
        """weight: a tensor [N, K] or a weight source, N a multiple of the ranks; bias [N].

        reduce: a name in `distributed.reduce.SUMS`.
        """
        source = parts.checked(cls, weight, group, reduce=reduce)
        return cls(_own_rows(source, group), bias, group, reduce)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], the same bits on every rank."""
        return parts.apply(self, x)

    def local_input(self, x: Tensor) -> Tensor:
        """All of x [B, K]."""
        return x

    def product(self, x: Tensor) -> Tensor:
        """X w_nᵀ, with this rank's slice of the bias -> [rows, N/R]."""
        return F.linear(x, self.part, None if self.bias is None else self.added[self.rows])

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dY[:, n_r] w_n -> [B, K]."""
        return dy[:, self.rows] @ self.part

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """dY[:, n_r]ᵀ X -> [N/R, K]."""
        return dy[:, self.rows].t() @ x

    def to_dense(self) -> Tensor:
        """The weight [N, K] on every rank."""
        return collectives.all_gather(self.part, self.group).flatten(0, 1)

    def restrict(self, source) -> dict[str, Tensor]:
        """What this rank's parameters would be for another dense [N, K]."""
        return {"weight": _own_rows(source, self.group)}

    def paths(self, batch: int) -> dict[str, str]:
        """How the results of the ranks are joined."""
        return ways.paths(self, batch)

    def cost(self, batch: int) -> Cost:
        """Per rank, one forward product."""
        height, K = self.weight.shape
        size = self.weight.element_size()
        return product_cost(
            batch,
            height,
            K,
            size,
            wire_forward=all_gather_wire(batch * self.out_features * size, self.ranks),
            wire_backward=all_reduce_wire(batch * K * size, self.ranks),
        )


def _own_columns(source, group) -> Tensor:
    width = source.shape[1] // collectives.group_size(group)
    start = collectives.group_rank(group) * width
    return parts.take_columns(source, slice(start, start + width))


def _own_rows(source, group) -> Tensor:
    height = source.shape[0] // collectives.group_size(group)
    start = collectives.group_rank(group) * height
    return parts.take_rows(source, start, start + height)
