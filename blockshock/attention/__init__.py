"""softmax(scale · Q Kᵀ) V, over the pairs that a pattern lets attend, in several ways: `METHODS`.

    method(q, k, v, *, causal=False, pattern=None, scale=None) -> out

q [batch, heads, Tq, D], k and v [batch, kv_heads, Tk, D], out like q. causal: query i sees keys
j <= i, or j <= i + Tk − Tq if causal is "bottom_right" (a cache of keys); ANDed with the pattern
(`patterns.Pattern`). scale: D ** -0.5 when None. A row that attends
to nothing is 0, with gradients of 0. What a method cannot do is a ValueError; `unsupported` tells
it without running. `work` counts the arithmetic.

A method may carry `unsupported(shape, *, dtype, device_type, causal, pattern, scale, backward)`,
with `shapes.Shape`: why it cannot run, or None.
"""

import torch

# Modules, not their functions: those have the same names and would hide them.
from blockshock.attention import block_sparse, flash_torch, flash_triton, peers, reference, shapes
from blockshock.attention.flash_torch import FlashAttentionTorch
from blockshock.attention.flash_triton import FlashAttentionTriton

__all__ = ["METHODS", "FlashAttentionTorch", "FlashAttentionTriton", "unsupported"]


def unsupported(
    method: str,
    q_shape,
    k_shape,
    dtype: torch.dtype,
    device_type: str,
    causal: bool | str = False,
    pattern=None,
    *,
    scale: float | None = None,
    backward: bool = False,
) -> str | None:
    """Why METHODS[method] cannot run, or None; nothing is run and no GPU is touched.

    q_shape [batch, heads, Tq, D] and k_shape [batch, kv_heads, Tk, D] are sizes; device_type
    "cuda" or "cpu"; backward: gradients will be asked for.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    try:
        shape = shapes.Shape.of(q_shape, k_shape)
    except ValueError as error:
        return str(error)
    try:
        shapes.causal_shift(causal, shape.Tq, shape.Tk)
    except ValueError as error:
        return str(error)
    reason = shapes.misfit(shape, pattern) or shapes.scale_refused(scale)
    rule = getattr(METHODS[method], "unsupported", None)
    if reason or rule is None:
        return reason
    return rule(
        shape,
        dtype=dtype,
        device_type=device_type,
        causal=causal,
        pattern=pattern,
        scale=scale,
        backward=backward,
    )


METHODS = {
    "reference": reference.reference,
    "sdpa_flash": peers.sdpa_flash,
    "sdpa_cudnn": peers.sdpa_cudnn,
    "flex": peers.flex,
    "flash_torch": flash_torch.flash_torch,
    "flash_triton": flash_triton.flash_triton,
    "block_sparse": block_sparse.block_sparse,
    "block_sparse_unpruned": block_sparse.block_sparse_unpruned,
}
