"""A pruned weight W [N, K] in 2:4 form: of every four entries of a row the two largest are held.

    Y = act(X Sᵀ + b)     dX = dZ S     dS = kept( dZᵀ X )      S 2:4, made of W ∘ (tiles kept)

The forward is the 2:4 product of `Packed24`, dX a dense one with the expanded S. The held values
are the parameter; all of them train, also those that are zero because their tile was dropped.

Under `torch.compile` the product is one operator, on GPUs by cuSPARSELt, without a backward.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from blockshock import masks
from blockshock.block_sparse import bsr, state, tiles
from blockshock.kernels import cusparselt, pack, products, sparse24
from blockshock.kernels.block_product import ACTIVATIONS
from blockshock.linear import parts
from blockshock.measure.floor import Cost
from blockshock.packed import Packed24, check_codes, check_shape, estimated_bytes


class SemiStructured(nn.Module):
    """values [N, K/2], the held entries row by row, bias [N] or None. Made by `from_dense`.

    A state_dict holds, besides these, which entries are held; a state brings its own.
    """

    method = "semi_structured"
    policies: ClassVar = {"frozen": {}, "plain": {}}

    def __init__(self, packed: Packed24, bias: Tensor | None, activation: str | None):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.packed, self.activation = packed, activation
        self.values = nn.Parameter(packed.values)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @staticmethod
    def unsupported(
        N, K, *, dtype, device_type, block=64, sparsity=None, activation=None
    ) -> str | None:
        """Why a weight [N, K] cannot be held so, or None."""
        reason = bsr.unsupported((N, K), block, sparsity, activation)
        reason = reason or cusparselt.unsupported(dtype, device_type)
        if reason:
            return reason
        try:
            check_shape(N, K)
        except ValueError as error:
            return str(error)
        return None

    @classmethod
    def from_dense(
        cls, weight, bias=None, *, block=64, sparsity=None, mask=None, activation=None
    ) -> "SemiStructured":
        """As `BlockSparseLinear.from_dense`; N and K must be multiples of 64."""
        bsr.check(cls, weight, bias, block=block, sparsity=sparsity, activation=activation)
        with torch.inference_mode(False), torch.no_grad():
            mask = bsr.choose(weight, block, sparsity, mask)
            pruned = tiles.masked(weight, mask, (block, block))
            packed = Packed24.pack(pruned, masks.make("magnitude", pruned))
        return cls(packed, bias, activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]. Raises ValueError for another size, dtype or device."""
        flat = parts.flatten(x, self.in_features, self.values)
        if torch.compiler.is_compiling() or self.values.is_meta:
            packed = self.packed
            y = _product_op(flat, packed.compressed, self.values, packed.codes, self.bias)
        else:
            self._follow()
            y = _Product.apply(flat, self.values, self.bias, self.packed)
        return ACTIVATIONS[self.activation](parts.unflatten(y, x))

    def to_dense(self) -> Tensor:
        """The weight [N, K]."""
        self._follow()
        return self.packed.unpack()

    def restrict(self, source: Tensor) -> dict[str, Tensor]:
        """What its parameter would be for another dense [N, K], such as a gradient."""
        return {"values": pack.gather_kept(source, self.packed.codes)}

    def cost(self, batch: int) -> Cost:
        """One forward product: half those of the dense matrix."""
        (N, K), size = self.packed.shape, self.values.element_size()
        held = estimated_bytes(N, K, size)
        return Cost(batch * N * K, held, batch * (N + K) * size, 0, 0)

    def weight_bytes(self) -> tuple[int, int]:
        """(by the definition of 2:4, held)."""
        N, K = self.packed.shape
        return estimated_bytes(N, K, self.values.element_size()), self.packed.nbytes

    def paths(self, batch: int) -> dict[str, str]:
        """What computes the products."""
        kernel = _kernel(self.packed, batch)
        return {"forward": products.describe(kernel, self.packed, (batch,))}

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )

    def get_extra_state(self) -> Tensor:
        """Which entries are held: `state.save` of the codes."""
        return state.save(self.packed.codes, self._about())

    def set_extra_state(self, kept: Tensor) -> None:
        """The codes are taken with the values."""

    def _load_from_state_dict(self, states, prefix, *others) -> None:
        codes = None
        if f"{prefix}values" in states:
            told = states.get(f"{prefix}_extra_state")
            try:
                codes = state.load(told, self.packed.codes.shape, self._about())
                check_codes(codes)
            except ValueError as error:
                errors = others[-1]
                errors.append(f"{prefix.rstrip('.') or 'the layer'}: {error}")
                return
        if codes is not None and type(self.values) is not nn.Parameter:  # sharded by FSDP
            if not torch.equal(codes, self.packed.codes.cpu()):
                others[-1].append(f"{prefix}values: shards of other entries; load before sharding")
                return
            codes = None
        known = len(others[-1])
        super()._load_from_state_dict(states, prefix, *others)
        if codes is not None and len(others[-1]) == known and not self.values.is_meta:
            self._pack(codes)

    def _about(self) -> dict:
        return {"method": self.method, "shape": [self.out_features, self.in_features]}

    def __setstate__(self, kept) -> None:
        super().__setstate__(kept)
        self._share()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._share()
        return self

    def _share(self) -> None:
        """The packed form shares the parameter's memory; a cast or a copy gives that another."""
        if type(self.values) is nn.Parameter and not self.values.is_meta and self._apart():
            self._pack(self.packed.codes)

    def _follow(self) -> None:
        """Copies the values where others give the parameter memory of their own, as FSDP does in
        each forward: it would not find what it gathers next in any other memory."""
        if self.values.is_meta or not self._apart():
            return
        with torch.inference_mode(False), torch.no_grad():
            values, packed = self.values.detach(), self.packed
            if (values.dtype, values.device) == (packed.values.dtype, packed.values.device):
                packed.values.copy_(values)
            else:
                self.packed = Packed24.from_codes(values, packed.codes.to(values.device))

    def _apart(self) -> bool:
        values = self.packed.values
        return self.values.data_ptr() != values.data_ptr() or self.values.dtype != values.dtype

    def _pack(self, codes: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            values = self.values.detach()
            self.packed = Packed24.from_codes(values, codes.to(values.device))
            self.values.data = self.packed.values


class _Product(torch.autograd.Function):
    """X Sᵀ + b; the values are the packed form's own."""

    @staticmethod
    def forward(ctx, x, values, bias, packed):
        ctx.save_for_backward(x, values)
        ctx.packed = packed
        with torch.autocast(x.device.type, enabled=False):  # it computes in the values' dtype
            return packed.product(x, bias, _kernel(packed, len(x)))

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a semi_structured layer has no second derivative (create_graph=True was asked "
                "for); use storage bsr there"
            )
        x, _ = ctx.saved_tensors
        of_x, of_values, of_bias, _ = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):  # a caller may be in one
            dx = dy @ ctx.packed.unpack() if of_x else None
            dvalues = ctx.packed.kept_gradient(dy, x) if of_values else None
        return dx, dvalues, dy.sum(0) if of_bias else None, None


@torch.library.custom_op("blockshock::semi_structured_product", mutates_args=())
def _product_op(
    x: Tensor, compressed: Tensor | None, values: Tensor, codes: Tensor, bias: Tensor | None
) -> Tensor:
    if compressed is not None and compressed.data_ptr() != values.data_ptr():
        raise RuntimeError(
            "the values of a semi_structured layer are not in the memory of its packed form (FSDP, "
            "or an assignment to .data, gave them other memory), which a compiled call cannot "
            "follow; call it without torch.compile, or use storage bsr"
        )
    with torch.autocast(x.device.type, enabled=False):
        return sparse24.product(x, compressed, values, codes, bias)


@_product_op.register_fake
def _(x, compressed, values, codes, bias):
    return x.new_empty(len(x), len(values))


def _no_backward(ctx, dy):
    raise RuntimeError(
        "a compiled semi_structured layer has no backward; train it without torch.compile, or use "
        "storage bsr"
    )


_product_op.register_autograd(_no_backward)


def _kernel(packed: Packed24, rows: int) -> str:
    """By the rule of `kernels.products`."""
    kind, like = products.kind(packed.mask_period()), packed.values
    return products.candidates("auto", kind, rows, like.dtype, like.device)[0]
