"""What a block-sparse layer is measured against: the same W as a dense matrix, and PyTorch's BSR.

dense        Y = act(X Wᵀ + b), W [N, K] with the zeros in it
torch_bsr    the same with W as `torch.sparse_bsr_tensor`, which `F.linear` multiplies: by a
             Triton kernel on a GPU, by MKL on the CPU; dX = dY W by the BSR form of Wᵀ
"""

import copy
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockshock.block_sparse import bsr, tiles
from blockshock.kernels.block_product import ACTIVATIONS
from blockshock.linear import parts
from blockshock.measure.floor import Cost, product_cost


class Dense(nn.Module):
    """weight [N, K], zero in the tiles that are not kept; bias [N] or None."""

    method = "dense"
    policies: ClassVar = {"frozen": {}, "plain": {}}

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.activation = nn.Parameter(weight), activation
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @staticmethod
    def unsupported(
        N, K, *, dtype, device_type, block=64, sparsity=None, activation=None
    ) -> str | None:
        """Why a weight [N, K] cannot be held so, or None."""
        return bsr.unsupported((N, K), block, sparsity, activation)

    @classmethod
    def from_dense(
        cls, weight, bias=None, *, block=64, sparsity=None, mask=None, activation=None
    ) -> "Dense":
        """As `BlockSparseLinear.from_dense`."""
        bsr.check(cls, weight, bias, block=block, sparsity=sparsity, activation=activation)
        mask = bsr.choose(weight, block, sparsity, mask)
        return cls(tiles.masked(weight.detach(), mask, (block, block)), bias, activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return ACTIVATIONS[self.activation](F.linear(x, self.weight, self.bias))

    def to_dense(self) -> Tensor:
        """The weight [N, K]."""
        return self.weight.detach().clone()

    def restrict(self, source: Tensor) -> dict[str, Tensor]:
        """What its parameter would be for another dense [N, K], such as a gradient."""
        return {"weight": source}

    def cost(self, batch: int) -> Cost:
        """One forward product."""
        N, K = self.weight.shape
        return product_cost(batch, N, K, self.weight.element_size())


class TorchBSR(nn.Module):
    """weight [N, K] and weight_t [K, N], sparse BSR, not trained; bias [N] or None."""

    method = "torch_bsr"
    policies: ClassVar = {"frozen": {}}

    def __init__(self, weight: Tensor, weight_t: Tensor, bias: Tensor | None, activation):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        self.register_buffer("weight", weight)
        self.register_buffer("weight_t", weight_t)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def __deepcopy__(self, memo: dict) -> "TorchBSR":
        """With clones of the BSR tensors, of which PyTorch makes no deep copies."""
        for held in (self.weight, self.weight_t):
            memo.setdefault(id(held), held.clone())
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    @staticmethod
    def unsupported(
        N, K, *, dtype, device_type, block=64, sparsity=None, activation=None
    ) -> str | None:
        """Why a weight [N, K] cannot be held so, or None."""
        reason = bsr.unsupported((N, K), block, sparsity, activation)
        if reason is None and (N % block or K % block):
            reason = (
                f"N = {N}, K = {K}: PyTorch's BSR needs multiples of block = {block}; pad the "
                "weight, or use method bsr"
            )
        if reason is None and device_type == "cpu" and dtype.itemsize < 4:
            reason = (
                f"PyTorch's BSR product on the CPU takes fp32 or fp64, got "
                f"{str(dtype).removeprefix('torch.')}; use one of them, or method bsr"
            )
        return reason

    @classmethod
    def from_dense(
        cls, weight, bias=None, *, block=64, sparsity=None, mask=None, activation=None
    ) -> "TorchBSR":
        """As `BlockSparseLinear.from_dense`; N and K must be multiples of the block."""
        bsr.check(cls, weight, bias, block=block, sparsity=sparsity, activation=activation)
        mask = bsr.choose(weight, block, sparsity, mask)
        weight = weight.detach()
        pair = _sparse(weight, mask, block), _sparse(weight.t(), mask.t(), block)
        return cls(*pair, bias, activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]. Raises ValueError for another size, dtype or device."""
        flat = parts.flatten(x, self.in_features, self.weight)
        y = _Product.apply(flat, self.weight, self.weight_t)
        y = y if self.bias is None else y + self.bias
        return ACTIVATIONS[self.activation](parts.unflatten(y, x))

    def to_dense(self) -> Tensor:
        """The weight [N, K]."""
        return self.weight.to_dense()

    def restrict(self, source: Tensor) -> dict[str, Tensor]:
        """Nothing of it is trained but the bias."""
        return {}

    def cost(self, batch: int) -> Cost:
        """One forward product of the kept tiles."""
        kept = self.weight.values()
        size = kept.element_size()
        dense = product_cost(batch, self.out_features, self.in_features, size)
        return Cost(2 * batch * kept.numel(), kept.nbytes, dense.activation_bytes, 0, 0)

    def weight_bytes(self) -> tuple[int, int]:
        """(of the kept values, held): those of Wᵀ and the indices of both come on top."""
        both = self.weight, self.weight_t
        parts = [t for w in both for t in (w.values(), w.crow_indices(), w.col_indices())]
        return self.weight.values().nbytes, sum(part.nbytes for part in parts)


class _Product(torch.autograd.Function):
    """F.linear with a sparse weight, whose own backward PyTorch has not."""

    @staticmethod
    def forward(ctx, x, weight, weight_t):
        ctx.weights = weight, weight_t
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        weight, weight_t = ctx.weights
        return _Product.apply(dy.contiguous(), weight_t, weight), None, None


def _sparse(weight: Tensor, mask: Tensor, block: int) -> Tensor:
    """The tiles that a mask keeps, also those that are zero, as PyTorch's BSR."""
    (R, C), kept = mask.shape, mask.nonzero()
    values = weight.reshape(R, block, C, block).transpose(1, 2)[kept[:, 0], kept[:, 1]]
    starts = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    # Not by `check_invariants=True`, with which PyTorch 2.11 warns that nobody asked for checks.
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.sparse_bsr_tensor(starts, kept[:, 1], values.contiguous(), weight.shape)
