"""How many parameters a decoder has, and what arithmetic a trained token costs.

    P = depth (width (heads + 2 kv_heads) D + width² + 3 width hidden) + width vocabulary
    FLOPs per token = 6 P + 12 depth width T        T tokens in a sequence, D = width / heads

P are the parameters that are multiplied: the head's, tied or not, and not the lookup of the
embedding. Each costs 2 FLOPs forward and 4 backward. The second part are the products Q Kᵀ and P V
with every query seeing every key: 12 · L · H · Q · T of PaLM (Chowdhery et al., arXiv:2204.02311,
appendix B), from which its MFU follows. A causal kernel does half of that part: 6 depth width T.
What checkpointing computes twice is not counted, as usual for MFU.
"""

from dataclasses import dataclass

from blockshock.transformer.config import DecoderConfig


@dataclass(frozen=True)
class Counts:
    """What `counts` found; the FLOPs are those of training, forward and backward."""

    parameters: int
    parameters_without_embeddings: int
    """Without the embedding, and without the head where it is another matrix."""
    flops_per_token: int
    """6 P + 12 depth width T: attention counted in full, as in PaLM's MFU."""
    flops_per_token_causal: int
    """6 P + 6 depth width T: the half of attention that a causal kernel does."""


def counts(config: DecoderConfig, tokens: int | None = None) -> Counts:
    """Of a decoder trained on sequences of `tokens` tokens (None: its context).

    Raises:
        ValueError: tokens below 1 or beyond the context.
    """
    T = config.context if tokens is None else tokens
    if not 1 <= T <= config.context:
        raise ValueError(f"tokens = {T}: 1 to context = {config.context} are needed")
    D = config.width // config.heads
    keys = config.kv_heads * D
    per_block = config.width * (2 * config.width + 2 * keys + 3 * config.hidden)
    vectors = config.width * (2 * config.depth + 1)  # scales of the norms, and biases
    if config.bias:
        vectors += config.depth * (3 * config.width + 2 * keys + 2 * config.hidden)
    table = config.vocabulary * config.width
    multiplied = config.depth * per_block + table
    attention = config.depth * config.width * T
    return Counts(
        parameters=multiplied + vectors + (0 if config.tied else table),
        parameters_without_embeddings=config.depth * per_block + vectors,
        flops_per_token=6 * multiplied + 12 * attention,
        flops_per_token_causal=6 * multiplied + 6 * attention,
    )
