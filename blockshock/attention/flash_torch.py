"""FlashAttention-2 in plain PyTorch: tile by tile, so that no [Tq, Tk] matrix is ever held.

Forward, for a tile of queries Q_i, over the tiles K_j, V_j of keys:

    S = scale · Q_i K_jᵀ    m' = max(m, rowmax S)    P = exp(S - m')    a = exp(m - m')
    l = a · l + rowsum P    A = a · A + P V_j        m = m'
    O_i = A / l             lse_i = m + log l

Backward, for a tile of keys, over the tiles of queries; P is made again from lse:

    P = exp(S - lse)        delta = rowsum(dO ∘ O)    dS = P ∘ (dO V_jᵀ - delta)
    dV_j += Pᵀ dO           dK_j += scale · dSᵀ Q_i   dQ_i += scale · dS K_j

Dao, arXiv:2307.08691, algorithms 1 and 2. Query heads that share a key head are rows of one tile,
so their gradients add up in the products. Sums are float32 (float64 for float64 inputs).
"""

import torch
from torch import Tensor

from blockshock.attention import derivatives, shapes

TILE = 128  # queries, and keys, of one tile


class FlashAttentionTorch(torch.autograd.Function):
    """`FlashAttentionTorch.apply(q, k, v, is_causal=False, scale=None) -> out`, shaped like q.

    q [batch, heads, Tq, D] with k, v [batch, kv_heads, Tk, D], or [batch, tokens, D] for one head;
    fp16, bf16, float32 or float64. Saves q, k, v, out and lse [batch, (heads,) Tq], the natural
    log-sum-exp of each row's scores in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: a gradient of the gradients is asked for; `reference` has one.
    """

    @staticmethod
    def forward(ctx, q, k, v, is_causal=False, scale=None):
        whole = (q, k, v) if q.dim() == 4 else tuple(x.unsqueeze(1) for x in (q, k, v))
        shape = shapes.check(*whole, scale=scale)
        ctx.shift = shapes.causal_shift(is_causal, shape.Tq, shape.Tk)
        ctx.scale = shape.D**-0.5 if scale is None else scale
        with shapes.without_autocast(q):
            out, lse = _forward(*whole, shape, ctx.shift, ctx.scale)
        out, lse = out.view(q.shape), lse.view(q.shape[:-1])
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        saved = *ctx.saved_tensors, d_out
        flat = d_out.dim() == 3
        q, k, v, out, lse, d_rows = (x.unsqueeze(1) for x in saved) if flat else saved
        with torch.no_grad(), shapes.without_autocast(q):
            gradients = _backward(q, k, v, out, lse, d_rows, ctx.shift, ctx.scale)
        if flat:
            gradients = tuple(x.squeeze(1) for x in gradients)
        return *derivatives.first_only(gradients, *saved), None, None


def flash_torch(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool | str = False, pattern=None, scale=None
) -> Tensor:
    """q [batch, heads, Tq, D], k and v [batch, kv_heads, Tk, D] -> [batch, heads, Tq, D].

    fp16, bf16, float32 or float64, on any device. causal: query i sees keys j <= i, or
    j <= i + Tk − Tq for "bottom_right". scale: D ** -0.5 when None.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a pattern.
    """
    reason = shapes.pattern_refused("flash_torch", pattern)
    if reason:
        raise ValueError(reason)
    shapes.check(q, k, v)
    return FlashAttentionTorch.apply(q, k, v, causal, scale)


def _forward(q, k, v, shape, shift, scale) -> tuple[Tensor, Tensor]:
    """out [batch, heads, Tq, D] and lse [batch, heads, Tq]."""
    wide = shapes.sum_dtype(q.dtype)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:-1], dtype=wide)
    for at in _tiles(shape.Tq):
        query = _rows(q, at, shape, wide)
        maximum = query.new_full((*query.shape[:-1], 1), -torch.inf)
        total = torch.zeros_like(maximum)
        sums = torch.zeros_like(query)
        for keys in _tiles(_seen_by(at.stop, shape.Tk, shift)):
            scores = _scores(query, k[:, :, keys].to(wide), at, keys, shift, scale)
            higher = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
            level = higher.masked_fill(higher == -torch.inf, 0)  # no score yet: nothing to subtract
            weights = scores.sub_(level).exp_()
            shrink = (maximum - level).exp_()
            total = total.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
            sums = sums.mul_(shrink).add_(weights @ v[:, :, keys].to(wide))
            maximum = higher
        lse[:, :, at] = _heads(maximum + total.log(), shape).squeeze(-1)
        # Without weights there is nothing to divide: the row is 0, and lse is -inf.
        out[:, :, at] = _heads(sums / total.masked_fill_(total == 0, 1), shape)
    return out, lse


def _backward(q, k, v, out, lse, d_out, shift, scale) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype of q."""
    shape = shapes.Shape.of(q.shape, k.shape)
    wide = lse.dtype
    delta = (d_out.to(wide) * out.to(wide)).sum(dim=-1)
    dq = q.new_zeros(q.shape, dtype=wide)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    level = lse.masked_fill(lse == -torch.inf, torch.inf)  # weights of zero where nothing is seen
    for keys in _tiles(_seen_by(shape.Tq, shape.Tk, shift)):
        key, value = k[:, :, keys].to(wide), v[:, :, keys].to(wide)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        for at in _tiles(shape.Tq):
            if shift is not None and at.stop + shift <= keys.start:
                continue  # above the diagonal
            query, d_rows = _rows(q, at, shape, wide), _rows(d_out, at, shape, wide)
            scores = _scores(query, key, at, keys, shift, scale)
            weights = scores.sub_(_rows(level[..., None], at, shape, wide)).exp_()
            d_value += weights.mT @ d_rows
            d_weights = d_rows @ value.mT
            d_scores = weights.mul_(d_weights.sub_(_rows(delta[..., None], at, shape, wide)))
            d_key += d_scores.mT @ query
            dq[:, :, at] += _heads(d_scores @ key, shape)
        dk[:, :, keys], dv[:, :, keys] = d_key.mul_(scale), d_value
    return dq.mul_(scale).to(q.dtype), dk, dv


def _seen_by(queries: int, Tk: int, shift: int | None) -> int:
    """How many keys the first so many queries see; those behind them are not read."""
    return Tk if shift is None else max(0, min(queries + shift, Tk))


def _scores(query, key, at, keys, shift, scale) -> Tensor:
    """S [batch, kv_heads, group · rows, columns], -inf above the diagonal, if there is one."""
    scores = (query @ key.mT).mul_(scale)
    if shift is not None and keys.stop - 1 > at.start + shift:  # the tile crosses the diagonal
        row = torch.arange(at.start, at.stop, device=query.device)
        column = torch.arange(keys.start, keys.stop, device=query.device)
        hidden = column > row[:, None] + shift
        scores.unflatten(2, (-1, len(row))).masked_fill_(hidden, -torch.inf)
    return scores


def _tiles(tokens: int) -> list[slice]:
    return [slice(start, min(start + TILE, tokens)) for start in range(0, tokens, TILE)]


def _rows(x: Tensor, at: slice, shape: shapes.Shape, dtype: torch.dtype) -> Tensor:
    """Tokens `at` of [batch, heads, Tq, ·] as [batch, kv_heads, group · rows, ·]."""
    tile = x[:, :, at].to(dtype)
    rows = at.stop - at.start
    return tile.reshape(shape.batch, shape.kv_heads, shape.group * rows, x.shape[-1])


def _heads(x: Tensor, shape: shapes.Shape) -> Tensor:
    """[batch, kv_heads, group · rows, ·] as [batch, heads, rows, ·]."""
    rows = x.shape[2] // shape.group
    return x.reshape(shape.batch, shape.heads, rows, x.shape[-1])


def _unsupported(shape, *, dtype, device_type, causal, pattern, scale, backward) -> str | None:
    return shapes.pattern_refused("flash_torch", pattern) or shapes.dtype_refused(
        "flash_torch", dtype, shapes.PRECISE
    )


flash_torch.unsupported = _unsupported
