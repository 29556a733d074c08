"""A decoder: the language model that the families' methods are tried in.

    x = E[tokens]                                        [B, T, width]
    x = x + out(attention(rope(q), rope(k), v))          q, k, v = qkv(rms(x)), per block
    x = x + down(silu(gate) ∘ up)                        gate, up = gate_up(rms(x)), per block
    logits = rms(x) Hᵀ                                   H [vocabulary, width], E itself if tied

No biases. rope turns the pair (x_i, x_{i + D/2}) of position t by the angle t · base^(−2i/D) (Su et
al., arXiv:2104.09864), so that q · k depends on the distance of two positions alone. SwiGLU:
Shazeer, arXiv:2002.05202. RMSNorm: Zhang and Sennrich, arXiv:1910.07467. Grouped queries: Ainslie
et al., arXiv:2305.13245.

Initial weights are normal with standard deviation 0.02; those that write to the residual stream
(out, down) have 0.02 / √(2 depth), as in GPT-2, so that the stream does not grow with the depth.
"""

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import blockshock
from blockshock.attention import METHODS
from blockshock.transformer.config import DecoderConfig

STD = 0.02
IGNORED = -100  # a target that adds nothing to the loss

Rope = tuple[Tensor, Tensor]  # cosines and sines [T, D/2], float32 or float64
Cache = tuple[Tensor, Tensor]  # keys and values of one block [B, kv_heads, tokens, D]


class Block(nn.Module):
    """Attention and MLP of one layer: x [B, T, width] -> [B, T, width]."""

    def __init__(self, config: DecoderConfig, checkpointed: bool, generator=None):
        super().__init__()
        width, D = config.width, config.head_width
        small = STD / (2 * config.depth) ** 0.5
        linear = partial(_linear, generator=generator)
        self.config, self.checkpointed = config, checkpointed
        self.attention_norm = nn.RMSNorm(width, config.eps)
        self.qkv = linear((config.heads + 2 * config.kv_heads) * D, width, STD)
        self.out = linear(width, width, small)
        self.mlp_norm = nn.RMSNorm(width, config.eps)
        self.gate_up = linear(2 * config.hidden, width, STD)
        self.down = linear(width, config.hidden, small)
        self.run = Block.compute

    def forward(self, x: Tensor, rope: Rope, cache: Cache | None = None, start: int = 0) -> Tensor:
        """rope: of the positions of x, which begin at `start`; cache: see `Decoder.generate`."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.run, self, x, rope, use_reentrant=False)
        if cache is not None:
            return self.compute(x, rope, cache, start)  # its sizes change with every token
        return self.run(self, x, rope)

    def compute(self, x: Tensor, rope: Rope, cache: Cache | None = None, start: int = 0) -> Tensor:
        """What `forward` returns; `compile_model` compiles it, and so no hooks of the module."""
        config = self.config
        heads, kv_heads = config.heads, config.kv_heads
        qkv = self.qkv(_normed(self.attention_norm, x)).unflatten(-1, (-1, config.head_width))
        q, k, v = qkv.transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
        q, k = rotate(q, rope), rotate(k, rope)
        causal = True
        if cache is not None:
            stop = start + x.shape[1]
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, start:stop] = new
            k, v = (kept[:, :, :stop] for kept in cache)
            causal = start == 0  # one new token sees all that went before it
        attend = METHODS[config.attention_on(x.device.type)]
        mixed = attend(q, k, v, causal=causal, pattern=config.pattern)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(_normed(self.mlp_norm, x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Head(nn.Module):
    """The last norm, the logits and the loss."""

    def __init__(self, config: DecoderConfig, weight: nn.Parameter):
        super().__init__()
        self.norm = nn.RMSNorm(config.width, config.eps)
        self.linear = nn.Linear(config.width, config.vocabulary, bias=False, device="meta")
        self.linear.weight = weight
        self.run = Head.compute

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x [B, T, width] -> logits [B, T, vocabulary], or the mean loss of the targets."""
        return self.run(self, x, targets)

    def compute(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """What `forward` returns.

        Compiled, the float32 logits of the loss are in no memory: the softmax's sums are taken, and
        its gradient is written, from the logits in the dtype of the product. Eager PyTorch holds
        them twice, and their gradient: 12 · B · T · vocabulary bytes more.
        """
        logits = self.linear(_normed(self.norm, x))
        if targets is None:
            return logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows = logits.flatten(0, 1).to(wide)
        return F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORED)


class Decoder(nn.Module):
    """A language model; `model(tokens)` are logits, `model(tokens, targets)` is the loss.

    config: its parts. checkpoint_blocks: each block keeps its input alone and computes the rest
    again in the backward. generator: of the initial weights, a CPU generator (None: PyTorch's
    default one); they are the same on every device. device: where the model is made.

    With `config.linear` this is a collective of all ranks, which must seed alike; the layers of one
    block are then parts of weights, and `blockshock.revert(model)` makes them whole.

    Raises:
        ValueError: the method `config.linear` cannot hold a projection.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        checkpoint_blocks: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config = config
        size = config.vocabulary, config.width
        weight = _normal(*size, STD, generator)
        self.embedding = nn.Embedding(*size, _weight=weight)
        self.blocks = nn.ModuleList(
            Block(config, checkpoint_blocks, generator) for _ in range(config.depth)
        )
        head = self.embedding.weight if config.tied else _normal(*size, STD, generator)
        self.head = Head(config, head if config.tied else nn.Parameter(head))
        self.to(device)
        if config.linear is not None:
            self._convert()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens int64 [B, T], T up to the context -> logits [B, T, vocabulary].

        The logits have the dtype of the products (bf16 inside such an autocast). targets int64
        [B, T]: instead the mean cross-entropy in float32 (float64 for a float64 model) over the
        targets that are not −100, NaN if all are.

        Raises:
            ValueError: another dtype or shape, or a sequence beyond the context.
        """
        self._check(tokens, targets)
        x, rope = self._embed(tokens), self._rope(0, tokens.shape[1])
        for block in self.blocks:
            x = block(x, rope)
        return self.head(x, targets)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        n: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """tokens int64 [B, T] followed by n sampled ones: [B, T + n], at most the context.

        temperature: divides the logits; 0 takes the most probable token. top_k: samples from so
        many of the most probable ones. generator: on the model's device. Keys and values are kept,
        so each token costs one position; with a pattern, which counts queries from 0, all positions
        are computed again.

        Raises:
            ValueError: n, temperature or top_k out of range, no token to begin with, or more tokens
                than the context.
        """
        self._check(tokens, None)
        B, T = tokens.shape
        if n < 0 or T + n > self.config.context:
            raise ValueError(
                f"{T} tokens and n = {n}: together they must fit the context of "
                f"{self.config.context}, and n be at least 0; give fewer"
            )
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature = {temperature}: a number of at least 0 is needed")
        if top_k is not None and not 1 <= top_k <= self.config.vocabulary:
            raise ValueError(f"top_k = {top_k}: 1 to {self.config.vocabulary}, or None, is needed")
        cached = self.config.pattern is None
        caches, start = None, 0
        for _ in range(n):
            x = self._embed(tokens[:, start:])
            if cached and caches is None:
                caches = [self._cache(B, T + n - 1) for _ in self.blocks]
            rope = self._rope(start, tokens.shape[1])
            for place, block in enumerate(self.blocks):
                x = block(x, rope, caches[place], start) if cached else block(x, rope)
            logits = self.head.compute(x[:, -1:])[:, 0]
            tokens = torch.cat([tokens, _sample(logits, temperature, top_k, generator)], dim=1)
            start = tokens.shape[1] - 1 if cached else 0
        return tokens

    def _check(self, tokens: Tensor, targets: Tensor | None) -> None:
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(
                f"tokens {str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}: "
                "int64 [batch, tokens] with at least one token is needed"
            )
        if tokens.shape[1] > self.config.context:
            raise ValueError(
                f"{tokens.shape[1]} tokens: the context is {self.config.context}; give fewer, or "
                "make the model with a larger context"
            )
        if targets is not None and (targets.dtype, targets.shape) != (tokens.dtype, tokens.shape):
            raise ValueError(
                f"targets {str(targets.dtype).removeprefix('torch.')} {list(targets.shape)}: int64 "
                f"{list(tokens.shape)} like the tokens is needed"
            )

    def _embed(self, tokens: Tensor) -> Tensor:
        """The residual stream's beginning, in the products' dtype: autocast leaves it float32."""
        x, kind = self.embedding(tokens), tokens.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

    def _rope(self, start: int, stop: int) -> Rope:
        """Made at each call: a buffer would be rounded by `.to(bfloat16)`."""
        weight, D = self.embedding.weight, self.config.head_width
        float64 = {"dtype": torch.float64, "device": weight.device}
        turns = self.config.rope_base ** (-torch.arange(0, D, 2, **float64) / D)
        angles = torch.outer(torch.arange(start, stop, **float64), turns)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return angles.cos().to(wide), angles.sin().to(wide)

    def _cache(self, B: int, tokens: int) -> Cache:
        weight = self.embedding.weight
        kind, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        size = B, self.config.kv_heads, tokens, self.config.head_width
        return tuple(torch.empty(size, dtype=dtype, device=weight.device) for _ in range(2))

    def _convert(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "convert changed nothing")  # an error follows
            report = blockshock.convert(self, self.config.linear, where="blocks.*")
        left = {name: why for name, why in report.left.items() if name.startswith("blocks.")}
        if left:
            name, reason = next(iter(left.items()))
            raise ValueError(
                f"linear = {self.config.linear!r} cannot hold {name}: {reason}. Or make the model "
                "with linear=None, and convert it with the options that the method needs"
            )


def compile_model(model: Decoder, **options) -> Decoder:
    """Compiles each block, and the loss, whole (no graph breaks); in place, returns the model.

    What is compiled are the computations, not the modules' calls: hooks on a block or on the head,
    such as a wrapper that gathers its parameters, run around them. All blocks share one graph.
    options: for `torch.compile`. `generate` stays eager: its sizes change with every token.
    """
    block = torch.compile(Block.compute, fullgraph=True, **options)
    head = torch.compile(Head.compute, fullgraph=True, **options)
    for one in model.blocks:
        one.run = block
    model.head.run = head
    return model


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [B, heads, T, D] turned by its positions, computed in the dtype of rope, in that of x."""
    cos, sin = rope
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """In the weight's dtype: PyTorch has no fused norm of bf16 by a float32 weight."""
    return norm(x.to(norm.weight.dtype))


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator) -> Tensor:
    """logits [B, vocabulary] -> tokens [B, 1]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def _normal(rows: int, columns: int, std: float, generator) -> Tensor:
    return torch.empty(rows, columns).normal_(0, std, generator=generator)


def _linear(rows: int, columns: int, std: float, *, generator) -> nn.Linear:
    # On the meta device first: nn.Linear would draw weights of its own.
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(_normal(rows, columns, std, generator))
    return layer
