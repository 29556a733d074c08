"""The decoder of a config, and its loss over a token file."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockshock.lm import checkpoint
from blockshock.lm import config as settings
from blockshock.lm.config import Config, Refused
from blockshock.lm.prepare import Prepared
from blockshock.lm.tokens import TokenFile, check_size
from blockshock.lm.whole import own_weights
from blockshock.runs.device import autocast, to_device
from blockshock.runs.ranks import Ranks
from blockshock.transformer import Decoder, DecoderConfig, TensorParallelDecoder, compile_model
from blockshock.transformer.language_model import LanguageModel
from blockshock.transformer.sync import plan


def decoder_config(config: Config) -> DecoderConfig:
    """The sizes of the model. Raises Refused where no such decoder can be."""
    sizes = settings.to_dict(config)["model"]
    name = sizes.pop("sync")
    del sizes["tensor_parallel"]
    try:
        if name is not None:
            plan(name, config.model.depth)
        return DecoderConfig(vocabulary=config.data.vocabulary, **sizes)
    except ValueError as error:
        raise Refused(f"model: {error}") from error


def make(config: Config, ranks: Ranks) -> LanguageModel:
    """The model with the initial weights of `train.seed`, alike on every rank and device.

    Tensor-parallel ranks hold it together, embedding and head as well.
    """
    sizes, options = decoder_config(config), {"checkpoint_blocks": config.train.checkpoint_blocks}
    options["generator"] = torch.Generator().manual_seed(config.train.seed)
    options["device"] = ranks.device
    try:
        if ranks.tensor_size == 1:
            model = Decoder(sizes, **options)
        else:
            options |= {"plan": config.model.sync or "tp", "group": ranks.tensor}
            model = TensorParallelDecoder(sizes, vocabulary_parallel=True, **options)
    except ValueError as error:
        raise Refused(f"model: {error}") from error
    return compile_model(model) if config.train.compile else model


def trained(config: Config, data: Prepared, ranks: Ranks) -> tuple[LanguageModel, int]:
    """The model of the run's checkpoint, and its step. Raises Refused where there is none."""
    state = checkpoint.load(Path(config.run))
    checkpoint.fits(state, settings.to_dict(config)["model"], config.data.vocabulary, data.digest)
    model = make(config, ranks)
    model.load_state_dict(own_weights(model, state["model"]))
    return model.eval(), state["step"]


@torch.no_grad()
def mean_loss(
    model: nn.Module, file: TokenFile, config: Config, ranks: Ranks, batches: int | None = None
) -> dict[str, Any]:
    """{"loss", "tokens"}: the mean cross-entropy (nats) over a token file. A collective.

    batches: of each data-parallel rank, their windows spread evenly over the file (None: as many as
    there are; a rest shorter than one batch of all ranks is left out).

    Raises:
        Refused: the file is too short for one batch of each rank.
    """
    context, batch = config.model.context, config.train.batch
    check_size(file, context, batch, ranks.data_size)
    count, together = file.windows(context), batch * ranks.data_size
    calls = min(count // together, batches or count)
    total = torch.zeros(1, device=ranks.device)
    training = model.training
    model.eval()
    for call in range(calls):
        first = call * together + ranks.data_rank * batch
        windows = [i * count // (calls * together) for i in range(first, first + batch)]
        x, y = (to_device(part, ranks.device) for part in file.take(windows, context))
        with autocast(config.train.autocast, ranks.device):
            total += model(x, y)
    model.train(training)
    (loss,) = ranks.mean(total / calls)
    return {"loss": loss, "tokens": calls * together * context}
