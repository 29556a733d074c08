"""Models made of the families' methods: `Decoder`, a language model, and `VisionTransformer`.

config = DecoderConfig(vocabulary=50304, context=1024, width=768, depth=12, heads=12)
model = compile_model(Decoder(config).cuda())
loss = model(tokens, targets)
counts(config).parameters
"""

from blockshock.transformer.config import DecoderConfig
from blockshock.transformer.counts import Counts, counts
from blockshock.transformer.decoder import Decoder, compile_model
from blockshock.transformer.vision import VisionConfig, VisionTransformer, compile_vision

__all__ = [
    "Counts",
    "Decoder",
    "DecoderConfig",
    "VisionConfig",
    "VisionTransformer",
    "compile_model",
    "compile_vision",
    "counts",
]
