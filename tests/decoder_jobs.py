"""What ranks run for tests/test_decoder.py."""

import torch
import torch.distributed as dist

from blockshock.distributed import collectives
from blockshock.transformer import Decoder, DecoderConfig

SIZES = {"vocabulary": 96, "context": 16, "width": 128, "depth": 1, "heads": 2, "hidden": 128}


def made(linear=None):
    config = DecoderConfig(**SIZES, attention="reference", linear=linear)
    return Decoder(config, generator=torch.Generator().manual_seed(0))


def against_dense(linear):
    """Layers replaced; the losses; the largest relative error of a gradient held by all ranks."""
    tokens = torch.arange(32).view(2, 16)
    found = {}
    for name in (None, linear):
        model = made(name)
        loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        found[name] = loss.item(), {n: p.grad for n, p in model.named_parameters()}
    replaced = [n for n, m in model.named_modules() if hasattr(m, "to_dense")]
    exact, own = found[None][1], found[linear][1]
    whole = [name for name in exact if name.rpartition(".")[0] not in replaced]
    errors = [float((own[n] - exact[n]).norm() / exact[n].norm()) for n in whole]
    return replaced, found[None][0], found[linear][0], max(errors)


def sampled(linear):
    """Whether ranks with different seeds write the same text."""
    model = made(linear)
    torch.manual_seed(dist.get_rank())
    return collectives.same_on_all_ranks(model.generate(torch.arange(4).view(1, 4), 8))
