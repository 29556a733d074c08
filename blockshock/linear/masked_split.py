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
from torch import Tensor

from blockshock.distributed import functions
from blockshock.distributed.joins import Gather, Sum
from blockshock.linear import parts, ways
from blockshock.linear.split import Split
from blockshock.measure.floor import Cost, all_reduce_wire, product_cost


class MaskedSplit(Split):
    """One masked term, dense. weight [N, K/S] with zeros where `mask` keeps nothing, bias [N]."""

    method = "masked_split"
    masks = ("tile", "tile_magnitude", "1100", "1010", "1001", "random", "magnitude")
    reduces = parts.REDUCES
    policies: ClassVar = {"frozen": {}, "plain": {}}

    def __init__(self, weight: Tensor, mask: Tensor, term: parts.Term, K: int, bias, group, how):
        N = weight.shape[0]
        super().__init__(weight, bias, N, K, group)
        self.mask, self.term = mask, term
        self._seen = None  # the weight's version when it was masked last
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

    def mask_state(self) -> dict[str, Tensor]:
        """The mask, bool [N, K/S]."""
        return {"mask": self.mask}

    def of_first_term(self, mask: Tensor) -> Tensor:
        """A term's mask is its partner's complement."""
        return ~mask if self.term.index else mask

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.mask = self.mask.to(self.weight.device)
        return self

    @torch.compiler.disable  # the version counter would be a guard
    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], the same bits on every rank."""
        self._mask_again()
        return parts.apply(self, x)

    @torch.no_grad()
    def _mask_again(self) -> None:
        """Entries off the mask, which a write may have brought, are the other term's.

        Gradients are masked, so no optimizer's step brings any.
        """
        now = self.written()
        if now != self._seen:
            self.part.data.mul_(self.mask)  # no change to what a backward has saved
            self._seen = now

    def local_input(self, x: Tensor) -> Tensor:
        """The shard's columns, [B, K/S]."""
        return x[:, self.term.columns]

    def product(self, x: Tensor) -> Tensor:
        """X W(g)ᵀ -> [rows, N]."""
        return F.linear(x, self.part, functions.bias_of_first(self))

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dY W(g) -> [B, K/S]."""
        return dy @ self.part

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """(dYᵀ X) ∘ M(g) -> [N, K/S]."""
        return (dy.t() @ x).mul_(self.mask)

    def paths(self, batch: int) -> dict[str, str]:
        """How the results of the ranks are joined."""
        return ways.paths(self, batch)

    def to_dense(self) -> Tensor:
        """The weight [N, K] on every rank: the sum of all terms."""
        self._mask_again()

        def place(full):
            full[:, self.term.columns] = self.part

        return parts.assemble(place, (self.out_features, self.in_features), self.part, self.group)

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
            wire_backward=all_reduce_wire(batch * self.in_features * size, self.ranks),
        )
