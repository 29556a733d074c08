"""A tensor-parallel decoder in one process, straight from the algebra of the plans, as a truth.

All ranks' streams are a list. Weights are a dense decoder's, cut by indexing; nothing of the
library is used but the plan's groups.
"""

import torch


def simulate(config, state, plan, ranks, tokens):
    """Logits [B, T, vocabulary] of the dense weights `state`."""
    c, R = config, ranks
    x = state["embedding.weight"][tokens]
    for group in plan.groups:
        if plan.kind == "desync":
            streams = [x] * R
            for i in group:
                bias = bias_of(state, i)
                partials = [partial(c, state, i, h, r, R) for r, h in enumerate(streams)]
                if i == group[-1]:
                    x = sum(h + bias for h in streams) / R + sum(partials)
                streams = [h + p + bias for h, p in zip(streams, partials, strict=True)]
            continue
        D, B = [torch.zeros_like(x)] * R, 0
        for i in group:
            read = [x if plan.kind == "parallel" else x + d + B for d in D]
            D = [d + partial(c, state, i, h, r, R) for r, (d, h) in enumerate(zip(D, read))]  # noqa: B905
            B = B + bias_of(state, i)
        x = x + B + sum(D)
    head = state["head.linear.weight" if not c.tied else "embedding.weight"]
    return norm(x, state["head.norm.weight"], c.eps) @ head.T


def bias_of(state, i):
    name = f"blocks.{i // 2}.{'down' if i % 2 else 'out'}.bias"
    return state.get(name, 0)


def partial(c, state, i, h, r, R):
    return (mlp if i % 2 else attention)(c, state, f"blocks.{i // 2}.", h, r, R)


def norm(x, scale, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale


def linear(state, name, h, rows):
    y = h @ state[f"{name}.weight"][rows].T
    return y + state[f"{name}.bias"][rows] if f"{name}.bias" in state else y


def attention(c, state, at, h, r, R):
    D = c.width // c.heads
    h = norm(h, state[at + "attention_norm.weight"], c.eps)
    T, of_kv = h.shape[1], c.heads // c.kv_heads
    mask = torch.ones(T, T, dtype=torch.bool, device=h.device).tril()
    places = torch.arange(T, device=h.device)
    mixed = []
    mine = range(r * c.heads // R, (r + 1) * c.heads // R)
    for head in mine:
        kv = c.heads + head // of_kv
        q, k, v = (
            linear(state, at + "qkv", h, slice(n * D, (n + 1) * D))
            for n in (head, kv, kv + c.kv_heads)
        )
        scores = turned(c, q, D) @ turned(c, k, D).transpose(1, 2) / D**0.5
        seen = mask
        if c.pattern is not None:
            at_head = torch.tensor(head, device=h.device)
            zero = torch.zeros_like(at_head)
            seen = mask & c.pattern.predicate(zero, at_head, places[:, None], places)
        mixed.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
    columns = slice(mine.start * D, mine.stop * D)
    return torch.cat(mixed, -1) @ state[at + "out.weight"][:, columns].T


def turned(c, x, D):
    t = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)
    angle = t[:, None] * c.rope_base ** (
        -torch.arange(0, D, 2, device=x.device, dtype=torch.float64) / D
    )
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def mlp(c, state, at, h, r, R):
    h = norm(h, state[at + "mlp_norm.weight"], c.eps)
    n = c.hidden // R
    gate = linear(state, at + "gate_up", h, slice(r * n, (r + 1) * n))
    up = linear(state, at + "gate_up", h, slice(c.hidden + r * n, c.hidden + (r + 1) * n))
    return (gate / (1 + (-gate).exp()) * up) @ state[at + "down.weight"][:, r * n : (r + 1) * n].T
