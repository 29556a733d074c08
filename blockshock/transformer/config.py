"""The sizes and parts of a decoder, checked once where they are given."""

from dataclasses import dataclass, fields

import torch

from blockshock import attention as family
from blockshock.attention.rules import Pattern
from blockshock.linear import METHODS as LINEAR_METHODS

# Used where no attention method is named: (without a pattern, with one).
ATTENTION = {"cuda": ("flash_triton", "block_sparse"), "other": ("flash_torch", "reference")}
ROUND_HIDDEN = 128


@dataclass(frozen=True)
class DecoderConfig:
    """What a `Decoder` is made of. Its weights are seeded where the model is made.

    vocabulary, context: number of tokens, and of positions in a sequence. width: of the residual
    stream; each of the `heads` has width / heads, which rotary positions need even. kv_heads: of
    keys and values, a divisor of heads (None: heads). hidden: of the SwiGLU MLP (None: 8/3 width,
    rounded up to a multiple of 128). tied: the head's weight is the embedding. bias: whether the
    projections of every block have biases, zero at first. attention: a name in
    `blockshock.attention.METHODS` (None: flash_triton on CUDA and flash_torch elsewhere; with a
    pattern block_sparse, reference). pattern: of `attention.patterns`, ANDed with causal. linear:
    a name in `blockshock.linear.METHODS` that `blockshock.convert` puts into the projections of
    every block (None: nn.Linear). rope_base: rotary frequencies are rope_base^(−2i/D). eps: of
    RMSNorm.

    Raises:
        ValueError: a value that cannot be, or an attention method that neither bf16 on CUDA nor
            float32 on the CPU can run at these sizes here.
    """

    vocabulary: int
    context: int
    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    hidden: int | None = None
    tied: bool = True
    bias: bool = False
    attention: str | None = None
    pattern: Pattern | None = None
    linear: str | None = None
    rope_base: float = 10000.0
    eps: float = 1e-5

    def __post_init__(self):
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        for field in fields(self):
            value = getattr(self, field.name)
            counted = field.type is int or (field.type == int | None and value is not None)
            if counted and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} = {value!r}: an int of at least 1 is needed")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                f"width = {self.width}, heads = {self.heads}: the width of a head must be a whole, "
                f"even number; make width a multiple of {2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads = {self.kv_heads} is no divisor of heads = {self.heads}: each serves "
                "equally many heads of queries; use a divisor"
            )
        if self.hidden is None:
            object.__setattr__(self, "hidden", usual_hidden(self.width))
        for name, least in (("rope_base", 1), ("eps", 0)):
            if not least < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} = {getattr(self, name)}: it must be above {least}")
        if self.linear is not None and self.linear not in LINEAR_METHODS:
            names = ", ".join(LINEAR_METHODS)
            raise ValueError(f"linear = {self.linear!r}: use one of {names}, or None for nn.Linear")
        reason = _attention_refused(self)
        if reason:
            raise ValueError(reason)

    @property
    def head_width(self) -> int:
        """D, the width of one head."""
        return self.width // self.heads

    def attention_on(self, device_type: str) -> str:
        """The attention method that runs on a device."""
        return self.attention or usual_attention(device_type, self.pattern)


def usual_hidden(width: int) -> int:
    """Hidden units of a SwiGLU MLP: 8/3 width, rounded up to a multiple of 128."""
    hidden = -(-8 * width // 3)
    return -(-hidden // ROUND_HIDDEN) * ROUND_HIDDEN


def usual_attention(device_type: str, pattern: Pattern | None) -> str:
    """The attention method for a device where none is named."""
    choices = ATTENTION.get(device_type, ATTENTION["other"])
    return choices[0] if pattern is None else choices[1]


def _attention_refused(config: DecoderConfig) -> str | None:
    """Why attention runs neither in bf16 on CUDA nor in float32 on the CPU, or None."""
    q = 1, config.heads, config.context, config.head_width
    k = 1, config.kv_heads, config.context, config.head_width
    reasons = [
        family.unsupported(
            config.attention_on(device_type),
            *(q, k, dtype, device_type, True, config.pattern),
            backward=True,
        )
        for device_type, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32))
    ]
    return None if None in reasons else reasons[0]
