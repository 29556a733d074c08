"""The superposed layer with a fixed pattern, computed as the dense product of its kept columns.

A fixed pattern keeps the same places of every four in all rows, so W(g) is a set of whole columns:

    Y  = Σ_g X[:, c_g] w_gᵀ            w_g = W[:, c_g], packed [N, K/2];  one all-reduce
    dX[:, c_g] = dY w_g                one all-gather
    dw_g = dYᵀ X[:, c_g]               local, at half the arithmetic

No sparse kernel is needed and nothing is multiplied by zero: the arithmetic is that of dense
row-parallel with the columns dealt out differently, which is the bound a fixed pattern can reach.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockshock import masks as masks24
from blockshock import sources
from blockshock.distributed import functions, reduce
from blockshock.linear import parts
from blockshock.measure.floor import Cost, all_gather_wire, all_reduce_wire, product_cost


class BlockShockFolded(nn.Module):
    """The kept columns of one term. weight [N, K/R], bias [N]."""

    masks = ("1100", "1010", "1001")
    policies: ClassVar = {"frozen": {}, "packed_master": {}}

    def __init__(self, weight: Tensor, columns: Tensor, bias, group):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("columns", columns, persistent=False)
        self.bias = parts.bias_parameter(bias)
        self.group = group

    @staticmethod
    def unsupported(N, K, *, dtype, device_type, ranks, mask=None) -> str | None:
        """Why this method cannot run, or None when it can."""
        return parts.term_unsupported(K, ranks)

    @classmethod
    def from_dense(cls, weight, bias=None, *, group=None, mask="1100") -> "BlockShockFolded":
        """weight: a tensor [N, K] or a weight source; bias [N]; mask: "1100", "1010" or "1001".

        Raises ValueError for a mask that is not the same in every row.
        """
        if mask not in cls.masks:
            raise ValueError(
                f"mask {mask!r} does not keep whole columns; the folded method takes "
                f"{', '.join(cls.masks)}; use block_shock for other masks"
            )
        source = sources.as_source(weight)
        K, ranks = source.shape[1], reduce.group_size(group)
        parts.Term.of(K, group)  # raises for an odd number of ranks or a K that does not divide
        columns = kept_by_rank(mask, K, ranks).to(source.device)
        own = columns[reduce.group_rank(group)]
        return cls(parts.take_columns(source, own), columns, bias, group)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], the same bits on every rank."""
        flat = parts.flatten(x, self.columns.numel(), self.weight)
        x_c = functions.take_columns(flat, self.columns, self.group)
        partial = F.linear(x_c, self.weight, functions.bias_of_first(self.bias, self.group))
        y = functions.sum_partials(partial, self.bias, self.group)
        return y.view(*x.shape[:-1], y.shape[-1])

    def to_dense(self) -> Tensor:
        """The weight [N, K] on every rank."""
        own = self.columns[reduce.group_rank(self.group)]

        def place(full):
            full[:, own] = self.weight

        shape = (self.weight.shape[0], self.columns.numel())
        return parts.assemble(place, shape, self.weight, self.group)

    def restrict(self, source) -> dict[str, Tensor]:
        """What this rank's parameters would be for another dense [N, K]."""
        own = self.columns[reduce.group_rank(self.group)]
        return {"weight": parts.take_columns(source, own)}

    def paths(self, batch: int) -> dict[str, str]:
        """What computes the products."""
        return {"forward": "dense product of kept columns", "backward": "dense product of w_gᵀ"}

    def cost(self, batch: int) -> Cost:
        """Per rank, one forward product."""
        N, width = self.weight.shape
        size, (ranks, _) = self.weight.element_size(), self.columns.shape
        return product_cost(
            batch,
            N,
            width,
            size,
            wire_forward=all_reduce_wire(batch * N * size, ranks),
            wire_backward=all_gather_wire(batch * width * ranks * size, ranks),
        )


def kept_by_rank(pattern: str, K: int, ranks: int) -> Tensor:
    """The columns each rank keeps, [ranks, K/ranks] int64: rank 2s + g has term g of shard s."""
    width = K // (ranks // 2)
    terms = [masks24.kept_columns(pattern, width, term) for term in (0, 1)]
    return torch.stack([terms[r % 2] + (r // 2) * width for r in range(ranks)])
