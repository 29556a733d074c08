"""The block-sparse kernels under autograd.

    Y = act(X Wᵀ + b)      dZ = dY act'(Z)      dX = dZ W      dw = tiles of dZᵀ X      db = Σ dZ

The product is linear in X and in the values, so its gradients are products and tiles again, and
these have gradients in turn: derivatives of every order are right.
"""

import torch
from torch import Tensor

from blockshock.block_sparse import plans
from blockshock.kernels import block_product
from blockshock.kernels.block_lists import Lists


def product(
    x: Tensor,
    values: Tensor,
    lists: Lists,
    width: int,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """act(X Wᵀ + b) by the Triton kernels: x [B, K] -> [B, width], differentiable.

    values [kept, b, b] and bias [width] have the dtype of x, bf16 or fp16.
    """
    return _Product.apply(x, values, bias, width, False, activation, *lists.tensors())[0]


class _Product(torch.autograd.Function):
    """(Y, Z) of x [B, K] and the values; transposed: X W of x [B, N]. Z is without activation, and
    empty where no gradient needs it.
    """

    @staticmethod
    def forward(ctx, x, values, bias, width, transposed, activation, *lists):
        keep = activation == "gelu" and any(ctx.needs_input_grad[:3])
        run = _product_op if torch.compiler.is_compiling() else _run_product
        y, z = run(x, values, bias, list(lists), width, transposed, activation, keep)
        of_x, of_values = ctx.needs_input_grad[:2]
        known = {"relu": y, "gelu": z}.get(activation)
        ctx.save_for_backward(x if of_values else None, values if of_x else None, known, *lists)
        ctx.options = x.shape[1], values.shape[-1], transposed, activation
        ctx.set_materialize_grads(False)
        if not keep:
            ctx.mark_non_differentiable(z)
        return y, z

    @staticmethod
    def backward(ctx, dy, dz):
        x, values, known, *lists = ctx.saved_tensors
        width, block, transposed, activation = ctx.options
        dx = dvalues = dbias = None
        of_z = dz if activation == "gelu" else None
        if dy is not None:
            if activation == "relu":
                dy = torch.ops.aten.threshold_backward(dy, known, 0)
            elif activation == "gelu":
                dy = torch.ops.aten.gelu_backward(dy, known)
        dz = dy if of_z is None else of_z if dy is None else dy + of_z
        if dz is not None:
            if ctx.needs_input_grad[0]:
                dx, _ = _Product.apply(dz, values, None, width, not transposed, None, *lists)
            if ctx.needs_input_grad[1]:
                both = (x, dz) if transposed else (dz, x)
                dvalues = _Tiles.apply(*both, block, *lists)
            if ctx.needs_input_grad[2]:
                dbias = dz.sum(0)
        return dx, dvalues, dbias, *(None,) * (3 + len(lists))


class _Tiles(torch.autograd.Function):
    """The kept tiles [kept, b, b] of dZᵀ X."""

    @staticmethod
    def forward(ctx, dz, x, block, *lists):
        ctx.save_for_backward(dz, x, *lists)
        run = _tiles_op if torch.compiler.is_compiling() else _run_tiles
        return run(dz, x, list(lists), block)

    @staticmethod
    def backward(ctx, of_tiles):
        dz, x, *lists = ctx.saved_tensors
        of_dz = of_x = None
        if ctx.needs_input_grad[0]:
            of_dz, _ = _Product.apply(x, of_tiles, None, dz.shape[1], False, None, *lists)
        if ctx.needs_input_grad[1]:
            of_x, _ = _Product.apply(dz, of_tiles, None, x.shape[1], True, None, *lists)
        return of_dz, of_x, None, *(None,) * len(lists)


def _run_product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: list[Tensor],
    width: int,
    transposed: bool,
    activation: str | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    made = Lists.of(lists)
    shape = (x.shape[1], width) if transposed else (width, x.shape[1])
    side = "dX" if transposed else "Y"
    y, z = block_product.product(
        x,
        values,
        made,
        width,
        transposed=transposed,
        bias=bias,
        activation=activation,
        keep=keep,
        plan=plans.chosen(side, shape, made, values.shape[-1], x),
    )
    return y, x.new_empty(0, width) if z is None else z


def _run_tiles(dz: Tensor, x: Tensor, lists: list[Tensor], block: int) -> Tensor:
    made, shape = Lists.of(lists), (dz.shape[1], x.shape[1])
    plan = plans.chosen("dW", shape, made, block, x)
    return block_product.gradient(dz, x, made, block, plan=plan)


# For a compiler alone: outside one an operator costs the host microseconds.
_product_op = torch.library.custom_op("blockshock::block_product", mutates_args=())(_run_product)
_tiles_op = torch.library.custom_op("blockshock::block_tiles", mutates_args=())(_run_tiles)


@_product_op.register_fake
def _(x, values, bias, lists, width, transposed, activation, keep):
    return x.new_empty(len(x), width), x.new_empty(len(x) if keep else 0, width)


@_tiles_op.register_fake
def _(dz, x, lists, block):
    return x.new_empty(len(lists[-1]), block, block)
