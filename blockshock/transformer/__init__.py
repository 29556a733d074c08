"""Models made of the families' methods: `Decoder`, a language model, whole or on several ranks, and
`VisionTransformer`.

config = DecoderConfig(vocabulary=50304, context=1024, width=768, depth=12, heads=12)
model = compile_model(Decoder(config).cuda())
loss = model(tokens, targets)
counts(config).parameters

model = TensorParallelDecoder(config, plan="spd12", device="cuda")  # on every rank; see `sync`
"""

from blockshock.transformer.config import DecoderConfig
from blockshock.transformer.counts import Counts, counts
from blockshock.transformer.decoder import Decoder
from blockshock.transformer.hybrid import HybridBlock, dense_reference
from blockshock.transformer.language_model import compile_model
from blockshock.transformer.tensor_parallel import TensorParallelDecoder
from blockshock.transformer.vision import VisionConfig, VisionTransformer, compile_vision

__all__ = [
    "Counts",
    "Decoder",
    "DecoderConfig",
    "HybridBlock",
    "TensorParallelDecoder",
    "VisionConfig",
    "VisionTransformer",
    "compile_model",
    "compile_vision",
    "counts",
    "dense_reference",
]
