"""The superposed layer with dense products of the masked halves: what 2:4 kernels must beat.

    W(g) = W ∘ M(g), stored dense with its zeros
    Y     = Σ_g X W(g)ᵀ            one all-reduce
    dX    = Σ_g dY W(g)            one all-reduce
    dW(g) = (dYᵀ X) ∘ M(g)         local

With 2S ranks, K is cut in S column shards and a pair of ranks holds the two terms of each.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockshock.distributed import collectives, functions
from blockshock.distributed.joins import Gather, Sum
from blockshock.linear import parts, ways
from blockshock.measure.floor import Cost, all_reduce_wire, product_cost


class MaskedSplit(nn.Module):
    """One masked term, dense. weight [N, K/S] with zeros where `codes` keep nothing, bias [N]."""

    masks = ("tile", "tile_magnitude", "1100", "1010", "1001", "random", "magnitude")
    reduces = parts.REDUCES
    policies: ClassVar = {"frozen": {}, "plain": {}}

    def __init__(self, weight: Tensor, mask: Tensor, term: parts.Term, K: int, bias, group, how):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("mask", mask)
        self.bias = parts.bias_parameter(bias)
        self.term, self.K, self.group = term, K, group
        self.ranks, N = collectives.group_size(group), weight.shape[0]
        self.output = Sum(how, N, group)
        self.input = Sum(how, K, group)
        if self.ranks > 2:
            self.input = Gather(how, K, parts.add_pairs, group)

    @staticmethod
    def unsupported(N, K, *, dtype, device_type, ranks, mask=None, reduce="auto") -> str | None:
        """Why this method cannot run, or None when it can."""
        pattern = mask or MaskedSplit.masks[0]
        return (
            parts.term_unsupported(K, ranks)
            or parts.rows_unsupported(pattern, N)
            or parts.reduce_unsupported(reduce, dtype, device_type)
        )

    @classmethod
    def from_dense(
        cls, weight, bias=None, *, group=None, mask="tile", seed=0, reduce="auto"
    ) -> "MaskedSplit":
        """weight: a tensor [N, K] or a weight source; bias [N]; mask: a name in masks.PATTERNS.

        reduce: a name in `distributed.reduce.SUMS`.
        """
        source = parts.checked(cls, weight, group, mask=mask, reduce=reduce)
        N, K = source.shape
        term = parts.Term.of(K, group)
        local = torch.empty(N, term.width, dtype=source.dtype, device=source.device)
        kept = torch.empty(N, term.width, dtype=torch.bool, device=source.device)
        for start, stop, rows in parts.blocks(source):
            kept[start:stop] = parts.term_mask(mask, rows, term, start=start, seed=seed)
            local[start:stop] = rows[:, term.columns] * kept[start:stop]
        return cls(local, kept, term, K, bias, group, reduce)

    __deepcopy__ = parts.copy_in_group

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], the same bits on every rank."""
        return parts.apply(self, x)

    def local_input(self, x: Tensor) -> Tensor:
        """The shard's columns, [B, K/S]."""
        return x[:, self.term.columns]

    def product(self, x: Tensor) -> Tensor:
        """X W(g)ᵀ -> [rows, N]."""
        return F.linear(x, self.weight, functions.bias_of_first(self))

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dY W(g) -> [B, K/S]."""
        return dy @ self.weight

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """(dYᵀ X) ∘ M(g) -> [N, K/S]."""
        return (dy.t() @ x).mul_(self.mask)

    def paths(self, batch: int) -> dict[str, str]:
        """How the results of the ranks are joined."""
        return ways.paths(self, batch)

    def to_dense(self) -> Tensor:
        """The weight [N, K] on every rank: the sum of all terms."""

        def place(full):
            full[:, self.term.columns] = self.weight

        return parts.assemble(place, (self.weight.shape[0], self.K), self.weight, self.group)

    def restrict(self, source) -> dict[str, Tensor]:
        """What this rank's parameters would be for another dense [N, K] under the same mask."""
        return {"weight": parts.take_columns(source, self.term.columns) * self.mask}

    def cost(self, batch: int) -> Cost:
        """Per rank, one forward product; the zeros are multiplied and read like any entry."""
        N, width = self.weight.shape
        size = self.weight.element_size()
        return product_cost(
            batch,
            N,
            width,
            size,
            wire_forward=all_reduce_wire(batch * N * size, self.ranks),
            wire_backward=all_reduce_wire(batch * self.K * size, self.ranks),
        )
