"""What every decoder does with its layers: logits, loss, and text token by token."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import TypeVar

import torch
from torch import Tensor, nn

from blockshock.transformer.config import DecoderConfig
from blockshock.transformer.sublayers import Cache, Rope


@dataclass(frozen=True)
class Caches:
    """What positions that were seen have left. blocks: keys and values of each block."""

    blocks: list[Cache]
    rope: Rope

    @property
    def tokens(self) -> int:
        """Positions that there is room for."""
        return len(self.rope[0])


class LanguageModel(nn.Module):
    """Base of the decoders, which provide `embedding`, `compute` and `compile_parts`."""

    config: DecoderConfig
    ranks = 1  # that hold the heads together

    def compute(
        self,
        tokens: Tensor,
        rope: Rope,
        targets: Tensor | None = None,
        *,
        caches: list[Cache] | None = None,
        start: int = 0,
        last: bool = False,
    ) -> Tensor:
        """Logits [B, T, vocabulary] of tokens [B, T], or the mean loss of targets.

        rope: of the tokens' positions, which begin at `start`. caches: of the blocks, filled up to
        there. last: of the last position alone, [B, 1, vocabulary].
        """
        raise NotImplementedError

    def compile_parts(self, compiler: Callable) -> None:
        """Puts compiler(function) in the place of what is computed; see `compile_model`."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens int64 [B, T], T up to the context -> logits [B, T, vocabulary].

        The logits have the dtype of the products (bf16 inside such an autocast). targets int64
        [B, T]: instead the mean cross-entropy in float32 (float64 for a float64 model) over the
        targets that are not −100, NaN if all are.

        Raises:
            ValueError: another dtype or shape, or a sequence beyond the context.
        """
        self._check(tokens, targets)
        return self.compute(tokens, self._rope(tokens.shape[1]), targets)

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
        many of the most probable ones. generator: on the model's device; of ranks that hold the
        model together the first one's draws count. Keys and values are kept, so each token costs
        one position; with a pattern, which counts queries from 0, all positions are computed again.

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
        caches, start = self.cache(B, T + n) if cached else None, 0
        for _ in range(n):
            logits = self._last_logits(tokens[:, start:], caches, start)
            token = self._alike(_sample(logits, temperature, top_k, generator))
            tokens = torch.cat([tokens, token], dim=1)
            start = tokens.shape[1] - 1 if cached else 0
        return tokens

    def cache(self, B: int, tokens: int) -> Caches:
        """Room for keys and values of B sequences of so many tokens, in the products' dtype.

        Raises:
            ValueError: tokens below 1, or beyond the context.
        """
        config, weight, dtype = self.config, self.embedding.weight, self._products_dtype()
        if not 1 <= tokens <= config.context:
            raise ValueError(
                f"a cache of {tokens} tokens: 1 to context = {config.context} are needed"
            )
        size = B, config.kv_heads // self.ranks, tokens, config.head_width
        # NaN, so that a position that was left out is seen in the logits.
        rooms = [
            tuple(torch.full(size, torch.nan, dtype=dtype, device=weight.device) for _ in range(2))
            for _ in range(config.depth)
        ]
        return Caches(rooms, self._rope(tokens))

    @torch.no_grad()
    def decode_step(self, token: Tensor, caches: Caches, position: int) -> Tensor:
        """token int64 [B, 1] at `position` -> logits [B, vocabulary] of the token after it.

        caches: made by `cache`, filled by a step for each position before this one (else the logits
        are NaN); the token's keys and values are written into it. A CUDA graph can hold a step of
        one position.

        Raises:
            ValueError: another dtype or shape, another model's cache, no room at the position, or a
                model with a pattern.
        """
        self._check(token, None)
        self._check_caches(caches)
        B = len(caches.blocks[0][0])
        if token.shape != (B, 1):
            raise ValueError(
                f"token {list(token.shape)}: int64 [{B}, 1], like the cache, is needed"
            )
        if not isinstance(position, int) or not 0 <= position < caches.tokens:
            raise ValueError(
                f"position = {position!r}: the cache has room for the ints 0 to "
                f"{caches.tokens - 1}; give one of them, or make a larger cache"
            )
        if self.config.pattern is not None:
            raise ValueError(
                f"a step of a model with pattern {self.config.pattern.name}: a pattern counts "
                "queries from 0, so no key can be kept; use generate, which computes all positions"
            )
        return self._last_logits(token, caches, position)

    def _last_logits(self, tokens: Tensor, caches: Caches | None, start: int) -> Tensor:
        """Logits [B, vocabulary] after tokens that begin at position `start`."""
        stop = start + tokens.shape[1]
        if caches is None:
            return self.compute(tokens, self._rope(stop), last=True)[:, 0]
        rope = tuple(part[start:stop] for part in caches.rope)
        return self.compute(tokens, rope, caches=caches.blocks, start=start, last=True)[:, 0]

    def _alike(self, token: Tensor) -> Tensor:
        """The first rank's token, on all ranks that hold the model together."""
        return token

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

    def _check_caches(self, caches: Caches) -> None:
        config, kept = self.config, caches.blocks[0][0]
        own = config.depth, config.kv_heads // self.ranks, config.head_width, self._products_dtype()
        given = len(caches.blocks), kept.shape[1], kept.shape[3], kept.dtype
        if given != own:
            names = "blocks, kv_heads, head width, dtype"
            raise ValueError(
                f"a cache with ({names}) = {given}, and the model here has {own}; make it with "
                "this model's `cache`, under the same autocast"
            )

    def _products_dtype(self) -> torch.dtype:
        weight = self.embedding.weight
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def _embed(self, tokens: Tensor) -> Tensor:
        """The residual stream's beginning, in the products' dtype: autocast leaves it float32."""
        return self.embedding(tokens).to(self._products_dtype())

    def _rope(self, tokens: int) -> Rope:
        """Of the first positions. No buffer: `.to(bfloat16)` would round it."""
        weight, D = self.embedding.weight, self.config.head_width
        float64 = {"dtype": torch.float64, "device": weight.device}
        turns = self.config.rope_base ** (-torch.arange(0, D, 2, **float64) / D)
        angles = torch.outer(torch.arange(tokens, **float64), turns)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return angles.cos().to(wide), angles.sin().to(wide)


Model = TypeVar("Model", bound=nn.Module)


def compile_model(model: Model, **options) -> Model:
    """Compiles each block, and the loss, whole (no graph breaks); in place, returns the model.

    What is compiled are the computations, not the modules' calls: hooks on a block or on the head,
    such as a wrapper that gathers its parameters, run around them. All blocks share one graph. Of a
    tensor-parallel decoder each sublayer is compiled, and of a `HybridBlock` what stands between a
    norm and a sum; sums over ranks run between them. options: for `torch.compile`. `generate` and
    `decode_step` stay eager: sizes change with every token (see
    `TensorParallelDecoder.compile_decoding`).
    """
    model.compile_parts(part_compiler(**options))
    return model


def part_compiler(**options) -> Callable[[Callable], Callable]:
    """What `compile_model` gives to `compile_parts`; models given the same one share their graphs.

    options: for `torch.compile`.
    """
    return cache(lambda function: torch.compile(_own(function), fullgraph=True, **options))


def _own(function: Callable) -> Callable:
    """A copy: the compiler counts compilations by code, so those of other models would count."""
    code = function.__code__.replace()
    name, defaults, closure = function.__name__, function.__defaults__, function.__closure__
    return FunctionType(code, function.__globals__, name, defaults, closure)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator) -> Tensor:
    """logits [B, vocabulary] -> tokens [B, 1]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
