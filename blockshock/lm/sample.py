"""Text from a trained model."""

import torch

from blockshock.lm import tokenizer
from blockshock.lm.config import Refused, Sample
from blockshock.lm.prepare import Prepared
from blockshock.transformer.language_model import LanguageModel


def sample(model: LanguageModel, data: Prepared, options: Sample) -> str:
    """The prompt and what the model writes after it, until its context is full.

    Raises:
        Refused: the prompt fills the context, or top_k exceeds the vocabulary.
    """
    ids = data.tokenizer.encode(options.prompt, add_special_tokens=False).ids
    ids = ids or [data.tokenizer.token_to_id(tokenizer.END)]
    room = model.config.context - len(ids)
    if room < 1:
        raise Refused(
            f"sample.prompt: {len(ids)} tokens leave no room in a context of "
            f"{model.config.context}; shorten it"
        )
    if options.top_k > model.config.vocabulary:
        raise Refused(
            f"sample.top_k = {options.top_k}: the vocabulary has {model.config.vocabulary}"
        )
    device = next(model.parameters()).device
    out = model.generate(
        torch.tensor([ids], device=device),
        min(options.tokens, room),
        temperature=options.temperature,
        top_k=options.top_k or None,
        generator=torch.Generator(device).manual_seed(options.seed),
    )
    return data.tokenizer.decode(out[0].tolist())
