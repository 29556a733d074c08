"""The block-sparse linear layer: Y = act(X Wᵀ + b), W [N, K] by its kept tiles of b × b (`bsr`).

    dZ = dY act'(Z)     dX = dZ W     dw(n, k) = dZ[:, n]ᵀ X[:, k] at the kept tiles     db = Σ dZ

The kept tiles are the parameter, so the layer trains on in this form, by any optimizer that works
element by element. Work and memory are (1 − sparsity) of the dense layer's.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from blockshock.block_sparse import bsr, products, state
from blockshock.kernels import block_lists, block_product
from blockshock.kernels.block_lists import Lists
from blockshock.linear import parts
from blockshock.measure.floor import Cost, product_cost

KERNELS = ("auto", "triton", "torch")


class BlockSparseLinear(nn.Module):
    """values [kept, b, b], bias [N] or None. Made by `from_dense`.

    activation: None, "relu" or "gelu" (the exact one), in the product's epilogue. kernel: "triton",
    "torch" (plain PyTorch, which multiplies by the expanded weight), or "auto": triton on GPUs of
    compute capability 9 and 10 in bf16 and fp16, else torch; `paths` says which.

    A state_dict holds, besides values and bias, which tiles are kept; a state of the same sizes and
    block brings its own tiles, also another number of them. `load_state_dict` refuses any other.
    """

    method = "bsr"
    kernels = KERNELS
    policies: ClassVar = {"frozen": {}, "plain": {}}

    def __init__(
        self,
        values: Tensor,
        lists: Lists,
        shape: tuple[int, int],
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        kernel: str = "auto",
    ):
        super().__init__()
        self.out_features, self.in_features = shape
        self.block, self.activation, self.kernel = values.shape[-1], activation, kernel
        self.lists = lists  # no buffers: averaging and casts would change them
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @staticmethod
    def unsupported(
        N, K, *, dtype, device_type, block=64, sparsity=None, activation=None, kernel="auto"
    ) -> str | None:
        """Why a weight [N, K] cannot be held so, or None."""
        if reason := bsr.unsupported((N, K), block, sparsity, activation):
            return reason
        if kernel not in KERNELS:
            return f"kernel = {kernel!r}: use one of {', '.join(KERNELS)}"
        return block_product.unsupported(dtype, device_type) if kernel == "triton" else None

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        block: int = 64,
        sparsity: float | None = None,
        mask: Tensor | None = None,
        activation: str | None = None,
        kernel: str = "auto",
    ) -> "BlockSparseLinear":
        """weight [N, K], of any sizes; bias [N], alike. block: 16, 32, 64, 128 or 256.

        sparsity: the (1 − sparsity) tiles with the largest mean of |W| are kept. mask: bool
        [⌈N / block⌉, ⌈K / block⌉], the tiles to keep. Neither: the tiles that are not zero.

        Raises ValueError for what cannot be held, and as `bsr.pack`.
        """
        options = {"activation": activation, "kernel": kernel}
        bsr.check(cls, weight, bias, block=block, sparsity=sparsity, **options)
        with torch.inference_mode(False), torch.no_grad():
            values, lists = bsr.pack(weight, block, sparsity=sparsity, mask=mask)
        return cls(values, lists, tuple(weight.shape), bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in the dtype of the values, or in autocast's.

        Raises ValueError for another number of features, dtype or device, and for a kernel that
        cannot run.
        """
        self._follow()
        values, bias, dtype = self.values, self.bias, parts.autocast_dtype(x)
        if dtype and values.dtype != torch.float64:  # F.linear leaves float64 alone as well
            values, bias = values.to(dtype), None if bias is None else bias.to(dtype)
        flat = parts.flatten(x, self.in_features, values)
        if self.by_triton(flat):
            product, width = products.product, self.out_features
        else:
            product, width = block_product.product_reference, (self.out_features, self.in_features)
        y = product(flat, values, self.lists, width, bias=bias, activation=self.activation)
        if self.activation == "relu" and x.dim() != 2:  # its backward reads y
            return y.view(*x.shape[:-1], self.out_features)
        return parts.unflatten(y, x)

    def to_dense(self) -> Tensor:
        """The weight [N, K], zeros where no tile is kept."""
        shape = self.out_features, self.in_features
        return block_product.expand(self.values.detach(), self.lists, shape).contiguous()

    def restrict(self, source: Tensor) -> dict[str, Tensor]:
        """What its parameter would be for another dense [N, K], such as a gradient."""
        return {"values": block_product.gather(source, self.lists, self.block)}

    def cost(self, batch: int) -> Cost:
        """One forward product: the kept tiles as a matrix of b columns, and X and Y."""
        size = self.values.element_size()
        dense = product_cost(batch, self.out_features, self.in_features, size)
        kept = self.values.numel()
        return Cost(2 * batch * kept, kept * size, dense.activation_bytes, 0, 0)

    def weight_bytes(self) -> tuple[int, int]:
        """(of the kept values, held): the lists come on top."""
        return self.values.nbytes, self.values.nbytes + self.lists.nbytes

    def paths(self, batch: int) -> dict[str, str]:
        """What computes the products."""
        if self.by_triton(self.values):
            return {"forward": "block-sparse Triton kernel"}
        return {"forward": "plain PyTorch: dense product with the expanded weight"}

    def extra_repr(self) -> str:
        """Sizes, tiles and options."""
        rows, columns = self.lists.grid
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block={self.block}, kept={self.lists.kept} of "
            f"{rows * columns} tiles, activation={self.activation}, kernel={self.kernel}"
        )

    def get_extra_state(self) -> Tensor:
        """Which tiles are kept: `state.save`."""
        return state.save(self.lists.mask().view(torch.uint8), self._about())

    def set_extra_state(self, kept: Tensor) -> None:
        """The tiles are taken before the values, which are as many."""

    def _load_from_state_dict(self, states, prefix, *others) -> None:
        if f"{prefix}values" in states:
            told, values = states.get(f"{prefix}_extra_state"), states[f"{prefix}values"]
            try:
                mask = state.load(told, self.lists.grid, self._about()).view(torch.bool)
                self._take_tiles(mask, values)
            except ValueError as error:
                errors = others[-1]
                errors.append(f"{prefix.rstrip('.') or 'the layer'}: {error}")
                return
        super()._load_from_state_dict(states, prefix, *others)
        self._follow()

    def _take_tiles(self, mask: Tensor, values: Tensor) -> None:
        """Makes room for the tiles of a state; its values are copied afterwards."""
        with torch.inference_mode(False):
            lists = block_lists.lists(mask.to(self.lists.device))
            shape = lists.kept, self.block, self.block
            if tuple(values.shape) != shape:
                raise ValueError(f"values {list(values.shape)} of a mask with {lists.kept} tiles")
            if self.values.shape != shape:
                self.values.data = self.values.data.new_empty(shape)
                self.values.grad = None  # of other tiles
            self.lists = lists

    def _about(self) -> dict:
        return {
            "method": self.method,
            "shape": [self.out_features, self.in_features],
            "block": self.block,
        }

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._follow()
        return self

    def _follow(self) -> None:
        """Moves the lists to the values, which FSDP and `.data` move alone. Where these are on
        meta, the lists stay: the tiles are known when memory for the values comes."""
        if self.lists.device != self.values.device and not self.values.is_meta:
            self.lists = self.lists.to(self.values.device)

    def by_triton(self, x: Tensor) -> bool:
        """Whether the kernels run on such an x; raises ValueError where they were asked for and
        cannot."""
        if self.kernel == "torch" or (self.kernel == "auto" and not x.is_cuda):
            return False
        reason = block_product.unsupported(x.dtype, x.device)
        if reason and self.kernel == "triton":
            raise ValueError(reason)
        return reason is None
