"""The superposed layer with a fixed pattern, computed as the dense product of its kept columns.

A fixed pattern keeps the same places of every four in all rows, so W(g) is a set of whole columns:

    Y  = Σ_g X[:, c_g] w_gᵀ            w_g = W[:, c_g], packed [N, K/2];  one all-reduce
    dX[:, c_g] = dY w_g                one all-gather
    dw_g = dYᵀ X[:, c_g]               local, at half the arithmetic

No sparse kernel is needed and nothing is multiplied by zero: the arithmetic is that of dense
row-parallel with the columns dealt out differently, which is the bound a fixed pattern can reach.
"""

from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from blockshock import masks as masks24
from blockshock.distributed import functions
from blockshock.distributed.joins import Gather, Sum
from blockshock.kernels import columns as kept_columns
from blockshock.linear import parts, ways
from blockshock.linear.split import Split
from blockshock.measure.floor import Cost


class BlockShockFolded(Split):
    """The kept columns of one term. weight [N, K/R], bias [N]."""

    method = "block_shock_folded"
    masks = ("1100", "1010", "1001")
    reduces = parts.REDUCES
    policies: ClassVar = {"frozen": {}, "packed_master": {}}

    def __init__(self, weight: Tensor, mask: str, term: parts.Term, K: int, bias, group, how):
        N = weight.shape[0]
        super().__init__(weight, bias, N, K, group)
        self.mask, self.term = mask, term
        first = tuple(place for place in range(4) if mask[place] == "1")
        self.places = first if term.index == 0 else kept_columns.others(first)
        self.output = Sum(how, N, group)
        self.input = Gather(how, K, partial(parts.place_pairs, places=first), group)

    @staticmethod
    def unsupported(N, K, *, dtype, device_type, ranks, mask=None, reduce="auto") -> str | None:
        """Why this method cannot run, or None when it can."""
        return parts.term_unsupported(K, ranks) or parts.reduce_unsupported(
            reduce, dtype, device_type
        )

    @classmethod
    def from_dense(
        cls, weight, bias=None, *, group=None, mask="1100", reduce="auto"
    ) -> "BlockShockFolded":
        """weight: a tensor [N, K] or a weight source; bias [N]; mask: "1100", "1010" or "1001".

        reduce: a name in `distributed.reduce.SUMS`. Raises ValueError for a mask that is not the
        same in every row.
        """
        if mask not in cls.masks:
            raise ValueError(
                f"mask {mask!r} does not keep whole columns; the folded method takes "
                f"{', '.join(cls.masks)}; use block_shock for other masks"
            )
        source = parts.checked(cls, weight, group, mask=mask, reduce=reduce)
        K, term = source.shape[1], parts.Term.of(source.shape[1], group)
        own = parts.take_columns(source, _columns(mask, term, source.device))
        return cls(own, mask, term, K, bias, group, reduce)

    def part_of(self) -> dict[str, str | int]:
        """What the weight is a part of: the mask is none that a state could bring."""
        return super().part_of() | {"mask": self.mask}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], the same bits on every rank."""
        return parts.apply(self, x)

    def local_input(self, x: Tensor) -> Tensor:
        """The kept columns of the shard, [B, K/R]."""
        return kept_columns.take(x[:, self.term.columns], self.places)

    def product(self, x_c: Tensor) -> Tensor:
        """X[:, c_g] w_gᵀ -> [rows, N]."""
        return F.linear(x_c, self.part, functions.bias_of_first(self))

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dY w_g -> [B, K/R]."""
        return dy @ self.part

    def weight_gradient(self, dy: Tensor, x_c: Tensor) -> Tensor:
        """dYᵀ X[:, c_g] -> [N, K/R]."""
        return dy.t() @ x_c

    def to_dense(self) -> Tensor:
        """The weight [N, K] on every rank."""
        own = _columns(self.mask, self.term, self.weight.device)

        def place(full):
            full[:, own] = self.part

        return parts.assemble(place, (self.out_features, self.in_features), self.part, self.group)

    def restrict(self, source) -> dict[str, Tensor]:
        """What this rank's parameters would be for another dense [N, K]."""
        return {"weight": parts.take_columns(source, _columns(self.mask, self.term, source.device))}

    def paths(self, batch: int) -> dict[str, str]:
        """What computes the products, and how the results of the ranks are joined."""
        products = {"forward": "dense product of the kept columns"}
        products["backward"] = "dense product with the kept columns, gathered"
        return products | ways.paths(self, batch)

    def cost(self, batch: int) -> Cost:
        """Per rank, one forward product."""
        return parts.row_cost(self, batch, self.weight.shape[1])


def _columns(mask: str, term: parts.Term, device) -> Tensor:
    """The columns of W that a term keeps: int64 [K/R]."""
    return masks24.kept_columns(mask, term.width, term.index, device=device) + term.start
