"""One process that computes what all ranks of a plan compute together: the truth of every check.

Straight from the algebra of `transformer.sync`, on the weights of a dense decoder, in plain PyTorch
and with attention by its definition. Rank r has its share of the heads and of the MLP's columns;
P_r is its term of a sublayer's output, and b the bias of that output.

    group       h_r = x + D_r + B;   D_r += P_r(h_r), B += b;   at the end x' = x + B + Σ_r D_r
    parallel    the same, but each sublayer of the group has h_r = x
    desync      h_r += P_r(h_r) + b, but at the last x' = 1/R Σ_r (h_r + b) + Σ_r P_r(h_r)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockshock.attention.reference import reference
from blockshock.transformer import Decoder
from blockshock.transformer.sublayers import rotate
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
        streams, total, bias = [x] * ranks, torch.zeros_like(x), torch.zeros_like(x)
        for sublayer in group:
            block, cache = model.blocks[sublayer // 2], caches and caches[sublayer // 2]
            if sublayer % 2:
                outputs = [_mlp(block, h, rank, ranks) for rank, h in enumerate(streams)]
            else:
                outputs = [
                    _attention(block, h, rope, cache, rank, ranks) for rank, h in enumerate(streams)
                ]
            b = (block.down if sublayer % 2 else block.out).bias
            b = torch.zeros_like(x) if b is None else b
            total, bias = total + sum(outputs), bias + b
            if plan.kind == "desync" and sublayer == group[-1]:
                total, bias = sum(outputs), b
                x = sum(streams) / ranks
            elif plan.kind != "parallel":
                streams = [h + out + b for h, out in zip(streams, outputs, strict=True)]
        x = x + bias + total
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
