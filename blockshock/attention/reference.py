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
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, pattern=None, scale=None
) -> Tensor:
    """q [batch, heads, Tq, D], k and v [batch, kv_heads, Tk, D] -> [batch, heads, Tq, D].

    fp16, bf16, float32 or float64, on any device; differentiable, twice as well. causal: query i
    sees keys j <= i (counted from the first of both), ANDed with the pattern. scale: D ** -0.5
    when None.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a pattern of another size.
    """
    shape = shapes.check(q, k, v, pattern=pattern, scale=scale)
    with shapes.without_autocast(q):
        scores, seen = _scores(q, k, shape, causal, pattern, scale, q.dtype)
        empty = ~seen.any(dim=-1, keepdim=True)
        # An empty row is given equal scores first: softmax of -inf alone is NaN.
        weights = scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
        return weights @ _for_each_head(v, shape)


def log_sum_exp(q: Tensor, k: Tensor, *, causal: bool = False, pattern=None, scale=None) -> Tensor:
    """lse [batch, heads, Tq] in float32 (float64 for float64); -inf where nothing is attended to.

    Arguments and errors as in `reference`.
    """
    shape = shapes.check(q, k, k, pattern=pattern, scale=scale)
    with shapes.without_autocast(q):
        wide = shapes.sum_dtype(q.dtype)
        return _scores(q, k, shape, causal, pattern, scale, wide)[0].logsumexp(dim=-1)


def attended(shape: shapes.Shape, *, causal: bool, pattern, device) -> Tensor:
    """The mask as bool [batch or 1, heads or 1, Tq, Tk]: True where query i attends to key j."""
    query = torch.arange(shape.Tq, device=device)[:, None]
    key = torch.arange(shape.Tk, device=device)[None, :]
    seen = torch.ones(1, 1, shape.Tq, shape.Tk, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (key <= query)
    if pattern is not None:
        sizes = shape.batch, shape.heads, shape.Tq, shape.Tk
        patterns.check_planes(pattern, sizes, device)
        batch = torch.arange(shape.batch if pattern.per_batch else 1, device=device)
        head = torch.arange(shape.heads if pattern.per_head else 1, device=device)
        seen = seen & patterns.evaluate(
            pattern, batch.view(-1, 1, 1, 1), head.view(-1, 1, 1), query, key
        )
    return seen


def _scores(q, k, shape, causal, pattern, scale, dtype) -> tuple[Tensor, Tensor]:
    """S with -inf where nothing is attended to, and the mask."""
    scale = shape.D**-0.5 if scale is None else scale
    seen = attended(shape, causal=causal, pattern=pattern, device=q.device)
    scores = scale * (q.to(dtype) @ _for_each_head(k, shape).to(dtype).mT)
    return scores.masked_fill(~seen, -torch.inf), seen


def _for_each_head(x: Tensor, shape: shapes.Shape) -> Tensor:
    """[batch, kv_heads, Tk, D] -> [batch, heads, Tk, D]."""
    return x.repeat_interleave(shape.group, dim=1)


def _unsupported(shape, *, dtype, device_type, causal, pattern, scale, backward) -> str | None:
    return shapes.dtype_refused("reference", dtype, shapes.PRECISE)


reference.unsupported = _unsupported
