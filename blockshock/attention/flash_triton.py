"""FlashAttention-2 in Triton, forward and backward, full and causal: `kernels.flash`.

Dao 2023, arXiv:2307.08691. No [Tq, Tk] matrix is held anywhere, and causal tiles above the diagonal
are never visited. Two runs give the same bits.
"""

import torch
from torch import Tensor

from blockshock.attention import derivatives, operators, shapes
from blockshock.kernels import flash


class FlashAttentionTriton(torch.autograd.Function):
    """`FlashAttentionTriton.apply(q, k, v, is_causal=False, scale=None) -> out`, shaped like q.

    q [batch, heads, Tq, D] with k, v [batch, kv_heads, Tk, D], or [batch, tokens, D] for one head;
    fp16, bf16 or fp32 on a GPU, all of one dtype (autocast does not cast them). Saves q, k, v, out
    and lse [batch, (heads,) Tq], the natural log-sum-exp of each row's scores in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: a gradient of the gradients is asked for; `reference` has one.
    """

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False, scale=None):
        shapes.tensors(q, k, v)
        shape = shapes.check(*_whole(q, k, v), scale=scale)
        reason = refused(shape, dtype=q.dtype, device_type=q.device.type, scale=scale)
        if reason:
            raise ValueError(reason)
        shift = shapes.causal_shift(is_causal, shape.Tq, shape.Tk)
        return attend(ctx, q, k, v, scale, shift=shift)

    @staticmethod
    def backward(ctx, d_out):
        return *gradients(ctx, d_out), None, None


def attend(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float | None, **options) -> Tensor:
    """The forward of an autograd function, of checked inputs. options: for `kernels.flash`."""
    ctx.options = {"scale": q.shape[-1] ** -0.5 if scale is None else float(scale), **options}
    run = operators.forward if torch.compiler.is_compiling() else flash.forward
    out, lse = run(*_whole(q, k, v), **ctx.options)
    if q.dim() == 3:
        out, lse = out[:, 0], lse[:, 0]
    ctx.save_for_backward(q, k, v, out, lse)
    return out


def _whole(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if tensors[0].dim() == 4 else tuple(x.unsqueeze(1) for x in tensors)


def gradients(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """Of q, k and v; None for what is not asked for."""
    saved = *ctx.saved_tensors, d_out
    flat = d_out.dim() == 3
    q, k, v, out, lse, upstream = (x.unsqueeze(1) for x in saved) if flat else saved
    wanted = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    run = operators.backward if torch.compiler.is_compiling() else flash.backward
    with torch.no_grad():
        made = run(q, k, v, out, lse, upstream, wanted=wanted, **ctx.options)
    if flat:
        made = tuple(x if x is None else x[:, 0] for x in made)
    there = derivatives.first_only(tuple(x for x in made if x is not None), *saved)
    rest = iter(there)
    return tuple(x if x is None else next(rest) for x in made)


def flash_triton(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool | str = False, pattern=None, scale=None
) -> Tensor:
    """softmax(scale · Q Kᵀ) V; see `FlashAttentionTriton`, and `blockshock.attention` for shapes.

    Raises ValueError for a pattern (`block_sparse` takes one) and for what the kernels cannot take.
    """
    reason = shapes.pattern_refused("flash_triton", pattern)
    if reason:
        raise ValueError(reason)
    if not isinstance(q, Tensor) or q.dim() != 4:
        shapes.check(q, k, v)  # raises
    return FlashAttentionTriton.apply(q, k, v, causal, scale)


def refused(shape: shapes.Shape, *, dtype, device_type: str, scale=None) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    reason = flash.unsupported(dtype, device_type)
    if reason is None and (shape.D % 8 or not 16 <= shape.D <= flash.MAX_D):
        reason = (
            f"D = {shape.D}: the attention kernels take heads of 16 to {flash.MAX_D}, in multiples "
            "of 8; pad D with zeros, or use reference"
        )
    facts = torch.finfo(torch.float32)
    if reason is None and scale is not None and not facts.tiny <= scale <= facts.max / 2:
        reason = (
            f"scale = {scale} must be positive and a number of float32; for a negative one negate q"
        )
    return reason


def _unsupported(shape, *, dtype, device_type, causal, pattern, scale, backward) -> str | None:
    reason = shapes.pattern_refused("flash_triton", pattern)
    return reason or refused(shape, dtype=dtype, device_type=device_type, scale=scale)


flash_triton.unsupported = _unsupported
