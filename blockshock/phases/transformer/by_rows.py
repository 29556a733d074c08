"""Plain attention over a pattern for long sequences, some rows of queries at a time.

    S = D^-½ Q Kᵀ       P = softmax(S) over the keys attended to       O = P V

No more than 2^27 scores are held at once, and keys that none of the rows sees are left out. As in
plain PyTorch, products and softmax are rounded to the inputs' dtype. The gradients of k and v are
sums over all rows: each part's is in the inputs' dtype, and they are added up in float32 at least,
as one product over all rows would. A row that attends to nothing is 0.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from blockshock.attention import patterns
from blockshock.attention.rules import Pattern

SCORES = 2**27


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, pattern: Pattern | None) -> Tensor:
    """q, k, v [B, heads, T, D] -> [B, heads, T, D]; differentiable once."""
    return _ByRows.apply(q, k, v, causal, pattern)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, pattern):
        ctx.save_for_backward(q, k, v)
        ctx.mask = causal, pattern
        out = torch.zeros_like(q)
        for rows, keys, heads, seen in _parts(q, *ctx.mask):
            part = q[:, heads, rows], k[:, heads, keys], v[:, heads, keys]
            out[:, heads, rows] = _plain(*part, seen)
        return out

    @staticmethod
    def backward(ctx, d_out):
        inputs = ctx.saved_tensors
        q = inputs[0]
        wide = torch.promote_types(q.dtype, torch.float32)
        totals = [torch.zeros_like(x, dtype=wide) for x in inputs]
        for rows, keys, heads, seen in _parts(q, *ctx.mask):
            places = [(slice(None), heads, at) for at in (rows, keys, keys)]
            part = [x[at].detach().requires_grad_() for x, at in zip(inputs, places, strict=True)]
            with torch.enable_grad():
                out = _plain(*part, seen)
            gradients = torch.autograd.grad(out, part, d_out[places[0]])
            for total, at, gradient in zip(totals, places, gradients, strict=True):
                total[at] += gradient
        return *(total.to(q.dtype) for total in totals), None, None


def _plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = (q.shape[-1] ** -0.5 * (q @ k.mT)).masked_fill(~seen, -torch.inf)
    # An empty row is given equal scores first: softmax of -inf alone is NaN.
    empty = ~seen.any(dim=-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0) @ v


def _parts(q: Tensor, causal: bool, pattern: Pattern | None) -> Iterator[tuple]:
    """(rows, keys, heads, mask [1 or B, 1 or heads, rows, keys]); all that is seen is in a part."""
    B, all_heads, T, _ = q.shape
    step = max(1, min(T, 256))
    for first in range(0, T, step):
        rows = slice(first, min(first + step, T))
        seen = _seen(q, rows, causal, pattern)
        (used,) = seen.flatten(0, 2).any(dim=0).nonzero(as_tuple=True)
        if not len(used):
            continue
        keys = slice(int(used[0]), int(used[-1]) + 1)
        some = max(1, SCORES // (B * step * (keys.stop - keys.start)))
        for head in range(0, all_heads, some):
            heads = slice(head, min(head + some, all_heads))
            own = seen[:, heads] if seen.shape[1] > 1 else seen
            yield rows, keys, heads, own[..., keys]


def _seen(q: Tensor, rows: slice, causal: bool, pattern: Pattern | None) -> Tensor:
    """Which keys these rows see: bool [1 or B, 1 or heads, rows, T]."""
    B, heads, T, _ = q.shape
    query = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    key = torch.arange(T, device=q.device)
    seen = key <= query if causal else torch.ones_like(key <= query)
    if pattern is None:
        return seen[None, None]
    batch = torch.arange(B if pattern.per_batch else 1, device=q.device).view(-1, 1, 1, 1)
    head = torch.arange(heads if pattern.per_head else 1, device=q.device).view(-1, 1, 1)
    return seen & patterns.evaluate(pattern, batch, head, query, key)
