"""The superposed layer: each rank holds one 2:4-sparse term of W.

    Y     = Σ_g X W(g)ᵀ            2:4 product, one sum over ranks
    dX    = Σ_g dY W(g)            2:4 product with the packed W(g)ᵀ, one sum over ranks
    dW(g) = (dYᵀ X) ∘ M(g)         at half the arithmetic where the mask is periodic ("tile" and the
                                   fixed ones); else the dense product, of which these are kept

W(g)ᵀ is 2:4 only for masks of 4×4 tiles with two kept in every row and column ("tile",
"tile_magnitude"). A mask that keeps whole columns c_g (1100, 1010, 1001) can be folded: Y is then
the sum of dense products X[:, c_g] w_gᵀ, and dX[:, c_g] = dY w_g is gathered. With other masks, and
with these under kernel="cusparselt", "thin" or "wide", dX is the dense product with the expanded
term. `paths` says what ran.

The parameter is, by `master` (`masters`), the kept values in packed form, which an optimizer writes
in place ("packed"), a float32 copy of them ("float32"), or the masked dense weight ("dense"). The
last is compressed again after each step, and multiplied by the library's kernel, unless another one
is asked for.

With 2S ranks, K is cut in S column shards and a pair of ranks holds the two terms of each.
"""

from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from blockshock import masks as masks24
from blockshock.distributed import exchange, functions
from blockshock.distributed.functions import Way
from blockshock.distributed.joins import Gather, Sum
from blockshock.kernels import columns, cusparselt, pack, products
from blockshock.linear import parts, ways
from blockshock.linear.masters import MASTERS
from blockshock.linear.packed_split import PackedSplit
from blockshock.measure.floor import Cost, all_reduce_wire
from blockshock.packed import Packed24, check_shape, estimated_bytes

FOLDED_MASKS = tuple(name for name, pattern in masks24.PATTERNS.items() if pattern.fixed)


class BlockShock(PackedSplit):
    """One 2:4 term. weight: as `masters` says, of [N, K/S]; bias [N], of the weight's dtype."""

    method = "block_shock"
    masks = ("tile", "tile_magnitude", "1100", "1010", "1001", "random", "magnitude")
    kernels = products.KERNELS
    reduces = parts.REDUCES
    policies: ClassVar = {
        "frozen": {},
        "dense_master": {"master": "dense"},
        "packed_master": {"master": "packed"},
        "float32_master": {"master": "float32"},
    }

    def __init__(
        self, packed: Packed24, master: str, term: parts.Term, K: int, bias, group, kernel, how
    ):
        self.kernel, self.how = kernel, how
        super().__init__(packed, master, term, K, bias, group)

    @staticmethod
    def unsupported(
        N, K, *, dtype, device_type, ranks, mask=None, kernel="auto", reduce="auto"
    ) -> str | None:
        """Why this method cannot run, or None when it can."""
        reason = (
            parts.term_unsupported(K, ranks, multiple=64)
            or cusparselt.unsupported(dtype, device_type)
            or products.unsupported(kernel or "auto", dtype, device_type)
            or parts.reduce_unsupported(reduce, dtype, device_type)
        )
        if kernel == "folded" and mask not in FOLDED_MASKS:
            reason = reason or (
                f"mask {mask or 'tile'} keeps other columns in each row, so kernel 'folded' cannot "
                f"be used; it takes {', '.join(FOLDED_MASKS)}"
            )
        if reason:
            return reason
        try:
            check_shape(N, K // (ranks // 2))
        except ValueError as error:
            return str(error)
        return None

    @classmethod
    def from_dense(
        cls,
        weight,
        bias=None,
        *,
        group=None,
        mask="tile",
        seed=0,
        master="packed",
        kernel="auto",
        reduce="auto",
    ) -> "BlockShock":
        """weight: a tensor [N, K] or a weight source, N and K multiples of 64; bias [N].

        mask: a name in `masks.PATTERNS`; seed: of the "random" mask; master: a name in
        `masters.MASTERS`; kernel: a name in `products.KERNELS`; reduce: a name in
        `distributed.reduce.SUMS`. Raises ValueError for what `unsupported` names, an unknown mask
        or master, and a weight that is not finite.
        """
        if master not in MASTERS:
            raise ValueError(f"unknown master {master!r}; use one of {', '.join(MASTERS)}")
        source = parts.checked(cls, weight, group, mask=mask, kernel=kernel, reduce=reduce)
        (N, K), device = source.shape, torch.device(source.device)
        term = parts.Term.of(K, group, multiple=64)
        packed = Packed24.empty(N, term.width, dtype=source.dtype, device=device)
        for start, _, rows in parts.blocks(source):
            kept = parts.term_mask(mask, rows, term, start=start, seed=seed)
            packed.write_rows(start, rows[:, term.columns].contiguous(), kept)
        if masks24.PATTERNS[mask].transposable:
            packed.with_transpose()
        return cls(packed, master, term, K, bias, group, kernel, reduce)

    @property
    def folds(self) -> bool:
        """Whether the products are dense ones of the kept columns."""
        whole = products.kind(self.packed.mask_period()) == "columns"
        return whole and self.kernel in ("auto", "folded") and not self._by_library

    @property
    def _by_library(self) -> bool:
        return self.master == "dense" and self.kernel in ("auto", "cusparselt")

    @torch.compiler.disable  # version counters would be guards, and each step another graph
    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], the same bits on every rank."""
        self._follow_weight()
        return parts.apply(self, x, self.packed.values)

    def candidates(self, rows: int, *, backward: bool) -> tuple[str | None, ...]:
        """What can multiply so many rows, in `product` or in `input_gradient`."""
        if backward and (self.folds or not self.packed.has_transpose):
            return (None,)  # dense products
        packed = self.packed.transposed if backward else self.packed
        kernel = "cusparselt" if self._by_library else self.kernel
        kind, like = products.kind(packed.mask_period()), packed.values
        return products.candidates(kernel, kind, rows, like.dtype, like.device)

    def local_input(self, x: Tensor, kernel: str) -> Tensor:
        """The shard's columns, [B, K/S], or the kept ones of them, where the product is folded."""
        own = x[:, self.term.columns]
        return self.packed.kept_input(own) if kernel == "folded" else own

    def product(self, x: Tensor, kernel: str, partials=None) -> Tensor:
        """X W(g)ᵀ of rows of the local input -> [rows, N]; partials: as in `Packed24.product`."""
        return self.packed.product(x, functions.bias_of_first(self), kernel, partials)

    def input_gradient(self, dy: Tensor, kernel: str | None = None, partials=None) -> Tensor:
        """dY W(g): dy [B, N] -> [B, K/S], or only the kept columns, where the layer folds."""
        if self.folds:
            return dy @ self.packed.values
        if self.packed.has_transpose:
            return self.packed.transposed.product(dy, None, kernel, partials)
        return dy @ MASTERS[self.master].term(self.part, self.packed)

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """(dYᵀ X) ∘ M(g) in the form of the parameter: dy [B, N], x the local input."""
        return MASTERS[self.master].like(self.packed.kept_gradient(dy, x), self.codes)

    @property
    def kind(self) -> str:
        """What decides the time of its products, besides their sizes."""
        library = ", compressed by the library" if self._by_library else ""
        both = " both ways" if self.packed.has_transpose else ""
        return f"BlockShock ({products.kind(self.packed.mask_period())} mask{both}{library})"

    def in_dtype(self, dtype: torch.dtype) -> "BlockShock":
        """A layer of the same mask that multiplies in another dtype; without the hooks of this one,
        which may hold a whole model.
        """
        with torch.inference_mode(False):
            packed = Packed24.from_codes(self.packed.values.to(dtype), self.codes)
            packed.with_transpose_if_possible()
            bias = None if self.bias is None else self.bias.to(dtype)
            options = self.term, self.in_features, bias, self.group, self.kernel, self.how
            return type(self)(packed, self.master, *options)

    def to_dense(self) -> Tensor:
        """The weight [N, K] that is multiplied, on every rank: the sum of all terms."""
        self._follow_weight()
        own = MASTERS[self.master].term(self.part, self.packed)

        def place(full):
            full[:, self.term.columns] = own

        return parts.assemble(place, (self.out_features, self.in_features), own, self.group)

    def restrict(self, source) -> dict[str, Tensor]:
        """What this rank's parameters would be for another dense [N, K] under the same mask."""
        local = parts.take_columns(source, self.term.columns)
        kept = pack.gather_kept(local, self.codes)
        return {"weight": MASTERS[self.master].like(kept, self.codes)}

    def paths(self, batch: int) -> dict[str, str]:
        """What computes the products and the sum of a batch of rows, once they have run."""
        (ahead, _), (back, _) = ways.used(self, batch)
        forward = self._describe(self.packed, ahead, batch)
        if self.folds:
            backward = "dense product with the kept columns, gathered"
        elif self.packed.has_transpose:
            backward = self._describe(self.packed.transposed, back, batch)
        else:
            backward = "dense product with the expanded term: the mask is not transposable"
        kind = products.kind(self.packed.mask_period())
        gradient = products.describe_gradient(kind, batch, self.packed.values)
        own = {"forward": forward, "backward": backward, "weight_gradient": gradient}
        return own | ways.paths(self, batch)

    def _describe(self, packed: Packed24, way: Way, batch: int) -> str:
        """The kernel of the largest chunk's product."""
        bounds = exchange.cut(batch, max(1, way.plan.chunks))
        sizes = sorted({stop - start for start, stop in pairwise(bounds)}, reverse=True)
        return products.describe(way.kernel, packed, (*sizes, batch))

    def weight_bytes(self) -> tuple[int, int]:
        """(estimated, actual) bytes of the weight in all its forms on this rank.

        Estimated: what a 2:4 matrix needs by definition, once for each direction that is kept.
        """
        N, K = self.packed.shape
        forms = 2 if self.packed.has_transpose else 1
        estimate = forms * estimated_bytes(N, K, self.packed.values.element_size())
        beside = 0 if MASTERS[self.master].shared else self.weight.nbytes
        return estimate + beside, self.packed.nbytes + beside

    def cost(self, batch: int) -> Cost:
        """Per rank, one forward product: half the products of the dense shard."""
        N, width = self.packed.shape
        size = self.packed.values.element_size()
        if self.folds:
            return parts.row_cost(self, batch, width // 2, self.packed.values)
        return Cost(
            flops=batch * N * width,
            weight_bytes=estimated_bytes(N, width, size),
            activation_bytes=batch * (N + width) * size,
            wire_forward=all_reduce_wire(batch * N * size, self.ranks),
            wire_backward=all_reduce_wire(batch * self.in_features * size, self.ranks),
        )

    def extra_repr(self) -> str:
        """Sizes, term and what computes the input gradient."""
        N, _ = self.packed.shape
        backward = "2:4" if self.packed.has_transpose else "dense (mask is not transposable)"
        return f"{self.in_features} -> {N}, term {self.term.index}, {self.master}, dX: {backward}"

    def _joins(self):
        N, _ = self.packed.shape
        output = Sum(self.how, N, self.group)
        if self.folds:
            places = masks24.places(self.packed.mask_period()[0])
            own = places if self.term.index == 0 else columns.others(places)
            place = partial(parts.place_pairs, places=own)
            return output, Gather(self.how, self.in_features, place, self.group)
        if self.ranks == 2:
            return output, Sum(self.how, self.in_features, self.group)
        return output, Gather(self.how, self.in_features, parts.add_pairs, self.group)
