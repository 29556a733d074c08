"""A decoder: the language model that the families' methods are tried in.

    x = E[tokens]                                        [B, T, width]
    x = x + out(attention(rope(q), rope(k), v))          q, k, v = qkv(rms(x)), per block
    x = x + down(silu(gate) ∘ up)                        gate, up = gate_up(rms(x)), per block
    logits = rms(x) Hᵀ                                   H [vocabulary, width], E itself if tied

The sublayers are in `sublayers`. The four projections of a block have biases where the config says
so, and begin with zeros.

Initial weights are normal with standard deviation 0.02; those that write to the residual stream
(out, down) have 0.02 / √(2 depth), as in GPT-2, so that the stream does not grow with the depth.
"""

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import blockshock
from blockshock.distributed import collectives
from blockshock.linear.split import Split
from blockshock.transformer.config import DecoderConfig
from blockshock.transformer.language_model import LanguageModel
from blockshock.transformer.sublayers import Cache, Rope, attention, mlp, rms

STD = 0.02
IGNORED = -100  # a target that adds nothing to the loss


class Block(nn.Module):
    """Attention and MLP of one layer: x [B, T, width] -> [B, T, width]."""

    def __init__(self, config: DecoderConfig, checkpointed: bool, generator=None):
        super().__init__()
        width, D = config.width, config.head_width
        small = STD / (2 * config.depth) ** 0.5
        linear = partial(_linear, bias=config.bias, generator=generator)
        self.config, self.checkpointed = config, checkpointed
        self.attention_norm = nn.RMSNorm(width, config.eps)
        self.qkv = linear((config.heads + 2 * config.kv_heads) * D, width, STD)
        self.out = linear(width, width, small)
        self.mlp_norm = nn.RMSNorm(width, config.eps)
        self.gate_up = linear(2 * config.hidden, width, STD)
        self.down = linear(width, config.hidden, small)
        self.run = Block.compute

    def forward(self, x: Tensor, rope: Rope, cache: Cache | None = None, start: int = 0) -> Tensor:
        """rope: of the positions of x, which begin at `start`; cache: see `sublayers.attention`."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(self.run, self, x, rope, use_reentrant=False)
        if cache is not None:
            return self.compute(x, rope, cache, start)  # its sizes change with every token
        return self.run(self, x, rope)

    def compute(self, x: Tensor, rope: Rope, cache: Cache | None = None, start: int = 0) -> Tensor:
        """What `forward` returns; `compile_model` compiles it, and so no hooks of the module."""
        config, h = self.config, _normed(self.attention_norm, x)
        x = x + attention(h, self.qkv, self.out, rope, config, config.pattern, cache, start)
        return x + mlp(_normed(self.mlp_norm, x), self.gate_up, self.down)


class Head(nn.Module):
    """The last norm, the logits and the loss."""

    def __init__(self, config: DecoderConfig, weight: nn.Parameter):
        super().__init__()
        self.norm = nn.RMSNorm(config.width, config.eps)
        self.linear = nn.Linear(config.width, config.vocabulary, bias=False, device="meta")
        self.linear.weight = weight
        self.run = Head.compute

    def forward(
        self, x: Tensor, targets: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """x [B, T, width] -> logits [B, T, vocabulary], or the mean loss of the targets.

        scale [width]: stands for the norm's.
        """
        return self.run(self, x, targets, scale)

    def compute(
        self, x: Tensor, targets: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """What `forward` returns.

        Compiled, the float32 logits of the loss are in no memory: the softmax's sums are taken, and
        its gradient is written, from the logits in the dtype of the product. Eager PyTorch holds
        them twice, and their gradient: 12 · B · T · vocabulary bytes more.
        """
        x = _normed(self.norm, x) if scale is None else rms(x, scale, self.norm.eps)
        logits = self.linear(x)
        if targets is None:
            return logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows = logits.flatten(0, 1).to(wide)
        return F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORED)


class Decoder(LanguageModel):
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
        make = partial(Block, config, checkpoint_blocks, generator)
        self.embedding, self.blocks, self.head = drawn(config, make, generator)
        self.to(device)
        if config.linear is not None:
            self._convert()

    def compute(self, tokens, rope, targets=None, *, caches=None, start=0, last=False) -> Tensor:
        """As in `LanguageModel`."""
        x = self._embed(tokens)
        for place, block in enumerate(self.blocks):
            x = block(x, rope) if caches is None else block(x, rope, caches[place], start)
        return self.head.compute(x[:, -1:]) if last else self.head(x, targets)

    def compile_parts(self, compiler: Callable) -> None:
        """Blocks and head."""
        block = compiler(Block.compute)
        for one in self.blocks:
            one.run = block
        self.head.run = compiler(Head.compute)

    def _alike(self, token: Tensor) -> Tensor:
        part = next((layer for layer in self.modules() if isinstance(layer, Split)), None)
        return token if part is None else collectives.all_gather(token, part.group)[0]

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


def drawn(
    config: DecoderConfig, block: Callable[[], nn.Module], generator
) -> tuple[nn.Embedding, nn.ModuleList, Head]:
    """Embedding, blocks and head with initial weights, in the order in which they are drawn."""
    size = config.vocabulary, config.width
    embedding = nn.Embedding(*size, _weight=_normal(*size, STD, generator))
    blocks = nn.ModuleList(block() for _ in range(config.depth))
    weight = embedding.weight if config.tied else nn.Parameter(_normal(*size, STD, generator))
    return embedding, blocks, Head(config, weight)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """In the weight's dtype: PyTorch has no fused norm of bf16 by a float32 weight."""
    return norm(x.to(norm.weight.dtype))


def _normal(rows: int, columns: int, std: float, generator) -> Tensor:
    return torch.empty(rows, columns).normal_(0, std, generator=generator)


def _linear(rows: int, columns: int, std: float, *, bias: bool, generator) -> nn.Linear:
    # On the meta device first: nn.Linear would draw weights of its own.
    layer = nn.Linear(columns, rows, bias=bias, device="meta")
    layer.weight = nn.Parameter(_normal(rows, columns, std, generator))
    if bias:
        layer.bias = nn.Parameter(torch.zeros(rows))
    return layer
