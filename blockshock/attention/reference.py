"""Attention by its definition, whole matrices at once: what every other method must equal.

    S = scale · Q Kᵀ        P = softmax(S) over the keys that are attended to        O = P V
    lse_i = log Σ_j exp S_ij   (natural logarithm, over the same keys)

As plain PyTorch computes it: each product and the softmax is rounded to the inputs' dtype, which
makes `reference` in a dtype the yardstick of what that dtype costs, and in float64 the truth. A row
that attends to nothing has O = 0, gradients of 0 and lse = -inf. Vaswani et al., arXiv:1706.03762.

Holds batch · heads · Tq · Tk scores: for truth and small sizes, not for speed.
"""

import torch
from torch import Tensor

from blockshock.attention import patterns, shapes


def reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool | str = False, pattern=None, scale=None
) -> Tensor:
    """q [batch, heads, Tq, D], k and v [batch, kv_heads, Tk, D] -> [batch, heads, Tq, D].

    fp16, bf16, float32 or float64, on any device; differentiable, twice as well. causal: query i
    sees keys j <= i (counted from the first of both), or "bottom_right" (from the last of both),
    ANDed with the pattern. scale: D ** -0.5 when None. NaN in keys that no query of a head sees, or
    in queries that see nothing, reaches no result; elsewhere it reaches what shares a product.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a pattern of another size.
    """
    shape = shapes.check(q, k, v, pattern=pattern, scale=scale)
    with shapes.without_autocast(q):
        seen = attended(shape, causal=causal, pattern=pattern, device=q.device)
        # A weight of zero times NaN is NaN: what takes no part is zero before the products.
        nothing, nobody = ~seen.any(-1, keepdim=True), ~seen.any(-2).unsqueeze(-1)
        q = q.masked_fill(nothing, 0)
        k, v = (_for_each_head(x, shape).masked_fill(nobody, 0) for x in (k, v))
        scores = _scores(q, k, seen, scale)
        # An empty row is given equal scores first: softmax of -inf alone is NaN.
        empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
        weights = scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
        return _Product.apply(weights, v).masked_fill(nothing, 0)


def log_sum_exp(
    q: Tensor, k: Tensor, *, causal: bool | str = False, pattern=None, scale=None
) -> Tensor:
    """lse [batch, heads, Tq] in float32 (float64 for float64); -inf where nothing is attended to.

    Arguments and errors as in `reference`.
    """
    shape = shapes.check(q, k, k, pattern=pattern, scale=scale)
    with shapes.without_autocast(q):
        wide = shapes.sum_dtype(q.dtype)
        seen = attended(shape, causal=causal, pattern=pattern, device=q.device)
        q, k = q.to(wide), _for_each_head(k, shape).to(wide)
        return _scores(q, k, seen, scale).logsumexp(dim=-1)


def attended(shape: shapes.Shape, *, causal: bool, pattern, device) -> Tensor:
    """The mask as bool [batch or 1, heads or 1, Tq, Tk]: True where query i attends to key j."""
    query = torch.arange(shape.Tq, device=device)[:, None]
    key = torch.arange(shape.Tk, device=device)[None, :]
    seen = torch.ones(1, 1, shape.Tq, shape.Tk, dtype=torch.bool, device=device)
    shift = shapes.causal_shift(causal, shape.Tq, shape.Tk)
    if shift is not None:
        seen = seen & (key <= query + shift)
    if pattern is not None:
        sizes = shape.batch, shape.heads, shape.Tq, shape.Tk
        patterns.check_planes(pattern, sizes, device)
        batch = torch.arange(shape.batch if pattern.per_batch else 1, device=device)
        head = torch.arange(shape.heads if pattern.per_head else 1, device=device)
        seen = seen & patterns.evaluate(
            pattern, batch.view(-1, 1, 1, 1), head.view(-1, 1, 1), query, key
        )
    return seen


class _Product(torch.autograd.Function):
    """a @ b in their dtype, and so its gradients of any order, inside a caller's autocast too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        with shapes.without_autocast(a):
            return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        a, b = ctx.saved_tensors
        return _Product.apply(upstream, b.mT), _Product.apply(a.mT, upstream)


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale) -> Tensor:
    """S [batch, heads, Tq, Tk], -inf where nothing is attended to; k for each head of q."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (scale * _Product.apply(q, k.mT)).masked_fill(~seen, -torch.inf)


def _for_each_head(x: Tensor, shape: shapes.Shape) -> Tensor:
    """[batch, kv_heads, Tk, D] -> [batch, heads, Tk, D]."""
    return x.repeat_interleave(shape.group, dim=1)


def _unsupported(shape, *, dtype, device_type, causal, pattern, scale, backward) -> str | None:
    return shapes.dtype_refused("reference", dtype, shapes.PRECISE)


reference.unsupported = _unsupported
