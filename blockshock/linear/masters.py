"""What the parameter of a 2:4 term is, and how the compressed form that is multiplied follows it.

    packed   the kept values [N, K/2], in the memory of the compressed form: what an optimizer
             writes is multiplied, and only the transposed copy is refreshed
    float32  the kept values [N, K/2] in float32; those that are multiplied are rounded from them,
             so that no small step of theirs is lost (Micikevicius et al., arXiv:1710.03740, 3.1)
    dense    the masked weight [N, K], masked and compressed again, as with PyTorch's 2:4 tensors

kept: the parameter -> kept values. like: kept values -> the parameter's form, for gradients.
renew: brings the compressed form into step with a parameter that was written. term: the dense
W(g) [N, K] that is multiplied. dtype: the parameter's, for products of a dtype. products: the
products' dtype, from the parameter's and what it was.
"""

import torch
from torch import Tensor

from blockshock import masks
from blockshock.kernels import pack
from blockshock.packed import Packed24


class Packed:
    """The compressed form's own values."""

    shared = True

    def parameter(self, packed: Packed24) -> Tensor:
        return packed.values

    def dtype(self, products: torch.dtype) -> torch.dtype:
        return products

    def products(self, parameter: torch.dtype, before: torch.dtype) -> torch.dtype:
        return parameter

    def kept(self, weight: Tensor, codes: Tensor) -> Tensor:
        return weight

    def like(self, kept: Tensor, codes: Tensor) -> Tensor:
        return kept

    def term(self, weight: Tensor, packed: Packed24) -> Tensor:
        return packed.unpack()

    def renew(self, weight: Tensor, packed: Packed24, *, by_library: bool) -> None:
        packed.mark_stale()


class Float32:
    """Float32 values beside the multiplied ones."""

    shared = False

    def parameter(self, packed: Packed24) -> Tensor:
        return packed.values.to(self.dtype(packed.values.dtype), copy=True)

    def dtype(self, products: torch.dtype) -> torch.dtype:
        return torch.promote_types(products, torch.float32)  # float64 stays

    def products(self, parameter: torch.dtype, before: torch.dtype) -> torch.dtype:
        return before

    def kept(self, weight: Tensor, codes: Tensor) -> Tensor:
        return weight

    def like(self, kept: Tensor, codes: Tensor) -> Tensor:
        return kept.to(self.dtype(kept.dtype))

    def term(self, weight: Tensor, packed: Packed24) -> Tensor:
        return packed.unpack()

    def renew(self, weight: Tensor, packed: Packed24, *, by_library: bool) -> None:
        packed.values.copy_(weight)
        packed.mark_stale()


class Dense:
    """The masked weight."""

    shared = False

    def parameter(self, packed: Packed24) -> Tensor:
        return packed.unpack()

    def dtype(self, products: torch.dtype) -> torch.dtype:
        return products

    def products(self, parameter: torch.dtype, before: torch.dtype) -> torch.dtype:
        return parameter

    def kept(self, weight: Tensor, codes: Tensor) -> Tensor:
        return pack.gather_kept(weight, codes)

    def like(self, kept: Tensor, codes: Tensor) -> Tensor:
        return pack.expand(kept, codes)

    def term(self, weight: Tensor, packed: Packed24) -> Tensor:
        return weight  # the library may have given zeros places of its own: `Packed24.recompress`

    def renew(self, weight: Tensor, packed: Packed24, *, by_library: bool) -> None:
        """by_library: cuSPARSELt finds the places anew, as `torch.sparse` does after each step."""
        weight.data.mul_(masks.decode(packed.codes))  # no change to what a backward has saved
        (packed.recompress if by_library else packed.rewrite)(weight)


MASTERS = {"packed": Packed(), "float32": Float32(), "dense": Dense()}
