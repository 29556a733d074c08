"""One process that computes what all ranks of a plan compute together: the truth of every check.

Straight from the algebra of `transformer.sync`, on the weights of a dense decoder, in plain PyTorch
and with attention by its definition. Rank r has its share of the heads and of the MLP's columns;
f_sr(h) is the partial result of sublayer s on rank r, without the bias b_s of its output.

    group       h_r = x + D_r + B;   D_r += f_sr(h_r), B += b_s;   at its end x = x + B + Σ_r D_r
    parallel    the same, but both sublayers of a block have h_r = x
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockshock.attention.reference import reference
from blockshock.transformer import Decoder
from blockshock.transformer.decoder import rotate
from blockshock.transformer.sync import Plan

Cache = tuple[Tensor, Tensor]  # keys and values of one block [B, kv_heads, tokens, D]


def logits(
    model: Decoder, plan: Plan, ranks: int, tokens: Tensor, caches: list[Cache] | None = None
) -> Tensor:
    """tokens int64 [B, T] -> logits [B, T, vocabulary], differentiable in the weights.

    caches: of what went before one token [B, 1], for each block; they are not changed.
    """
    x = model.embedding(tokens)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    start = caches[0][0].shape[2] if caches else 0
    rope = _rope(model, start, start + tokens.shape[1])
    for group in plan.groups:
        partials, bias = [torch.zeros_like(x) for _ in range(ranks)], torch.zeros_like(x)
        for sublayer in group:
            block = model.blocks[sublayer // 2]
            cache = caches[sublayer // 2] if caches else None
            for rank, partial in enumerate(partials):
                h = x if plan.kind == "parallel" else x + partial + bias
                if sublayer % 2:
                    found = _mlp(block, h, rank, ranks)
                else:
                    found = _attention(block, h, rope, cache, rank, ranks)
                partials[rank] = partial + found
            last = block.down if sublayer % 2 else block.out
            bias = bias if last.bias is None else bias + last.bias
        x = x + bias + sum(partials)
    return model.head.linear(_normed(model.head.norm, x))


def _attention(block, h: Tensor, rope, cache: Cache | None, rank: int, ranks: int) -> Tensor:
    config, D = block.config, block.config.head_width
    heads, keys = config.heads * D, config.kv_heads * D
    q_rows, k_rows = _share(heads, rank, ranks), _share(keys, rank, ranks)
    normed = _normed(block.attention_norm, h)
    q, k, v = (
        _rows(block.qkv, normed, rows.start + start, rows.stop + start)
        .unflatten(-1, (-1, D))
        .transpose(1, 2)
        for rows, start in ((q_rows, 0), (k_rows, heads), (k_rows, heads + keys))
    )
    q, k = rotate(q, rope), rotate(k, rope)
    if cache is not None:
        own = _share(config.kv_heads, rank, ranks)
        k, v = (torch.cat([kept[:, own], new], 2) for kept, new in zip(cache, (k, v), strict=True))
    mixed = reference(q, k, v, causal=cache is None).transpose(1, 2).flatten(2)
    return F.linear(mixed, block.out.weight[:, q_rows])


def _mlp(block, h: Tensor, rank: int, ranks: int) -> Tensor:
    hidden = block.config.hidden
    own = _share(hidden, rank, ranks)
    normed = _normed(block.mlp_norm, h)
    gate = _rows(block.gate_up, normed, own.start, own.stop)
    up = _rows(block.gate_up, normed, hidden + own.start, hidden + own.stop)
    return F.linear(F.silu(gate) * up, block.down.weight[:, own])


def _rows(layer: nn.Linear, x: Tensor, start: int, stop: int) -> Tensor:
    """The outputs `start` to `stop` of a layer."""
    bias = None if layer.bias is None else layer.bias[start:stop]
    return F.linear(x, layer.weight[start:stop], bias)


def _share(size: int, rank: int, ranks: int) -> slice:
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return norm(x.to(norm.weight.dtype))


def _rope(model: Decoder, start: int, stop: int) -> tuple[Tensor, Tensor]:
    config, weight = model.config, model.embedding.weight
    float64 = {"dtype": torch.float64, "device": weight.device}
    D = config.head_width
    turns = config.rope_base ** (-torch.arange(0, D, 2, **float64) / D)
    angles = torch.outer(torch.arange(start, stop, **float64), turns)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)
