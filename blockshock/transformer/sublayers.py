"""The two sublayers of a block, computed alike by a dense block and by one rank's part of it.

    attention   out(attend(rope(q), rope(k), v))    q, k, v = qkv(h)          h = rms(x)
    mlp         down(silu(gate) ∘ up)               gate, up = gate_up(h)

h [B, T, width] -> [B, T, width]. The projections are functions: of a dense block they are whole, of
a part they have the rank's heads or its share of the hidden units, and the result is a partial sum.

rope turns the pair (x_i, x_{i + D/2}) of position t by the angle t · base^(−2i/D) (Su et al.,
arXiv:2104.09864), so that q · k depends on the distance of two positions alone. SwiGLU: Shazeer,
arXiv:2002.05202. RMSNorm: Zhang and Sennrich, arXiv:1910.07467. Grouped queries: Ainslie et al.,
arXiv:2305.13245.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from blockshock.attention import METHODS
from blockshock.attention.rules import Pattern
from blockshock.transformer.config import DecoderConfig

Rope = tuple[Tensor, Tensor]  # cosines and sines [T, D/2], float32 or float64
Cache = tuple[Tensor, Tensor]  # keys and values of one block [B, kv_heads, tokens, D]
Projection = Callable[[Tensor], Tensor]


def rms(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMSNorm in the scale's dtype: PyTorch has no fused norm of bf16 by a float32 scale."""
    return F.rms_norm(x.to(scale.dtype), scale.shape, scale, eps)


def attention(
    h: Tensor,
    qkv: Projection,
    out: Projection,
    rope: Rope,
    config: DecoderConfig,
    pattern: Pattern | None,
    cache: Cache | None = None,
    start: int = 0,
) -> Tensor:
    """qkv: to the heads that are here, of q, then of k, then of v. pattern: of these heads.

    rope: of the positions of h, which begin at `start`. cache: keys and values of the positions
    before `start`; those of h are written into it.
    """
    heads = qkv(h).unflatten(-1, (-1, config.head_width)).transpose(1, 2)
    kv_heads = heads.shape[1] // (config.heads // config.kv_heads + 2)
    qk, v = heads.split((heads.shape[1] - kv_heads, kv_heads), dim=1)
    q, k = rotate(qk, rope).split((qk.shape[1] - kv_heads, kv_heads), dim=1)
    causal = True
    if cache is not None:
        stop = start + h.shape[1]
        for kept, new in zip(cache, (k, v), strict=True):
            kept[:, :, start:stop] = new
        k, v = (kept[:, :, :stop] for kept in cache)
        causal = start == 0  # one new token sees all that went before it
    attend = METHODS[config.attention_on(h.device.type)]
    mixed = attend(q, k, v, causal=causal, pattern=pattern)
    return out(mixed.transpose(1, 2).flatten(2))


def mlp(h: Tensor, gate_up: Projection, down: Projection) -> Tensor:
    """gate_up: to the gates of the hidden units that are here, then to their values."""
    gate, up = gate_up(h).chunk(2, dim=-1)
    return down(F.silu(gate) * up)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [B, heads, T, D] turned by its positions, computed in the dtype of rope, in that of x."""
    cos, sin = rope
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
