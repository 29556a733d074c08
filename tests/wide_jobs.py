"""A stand-in for the wide kernel where there is no GPU, and what the ranks do with it.

It takes the kernel's own operands, puts W together again from them, and multiplies densely.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from blockshock import tuning
from blockshock.kernels import pack, products, wide24
from blockshock.linear import METHODS, ways
from tests import follow_jobs, linear_jobs, tuning_jobs


def codes_of(places):
    """The inverse of `wide24.arrange_places`."""
    tiles, blocks, _ = places.shape
    shifts = torch.arange(0, 32, 4).view(2, 4)  # half, j
    words = places.view(tiles, blocks, 4, 8, 2, 2, 1, 1)  # t, b, w, g, s, u
    codes = (words >> shifts & 15).permute(0, 2, 6, 3, 1, 4, 5, 7)
    return codes.reshape(tiles * 64, blocks * 16).to(torch.uint8)


@contextlib.contextmanager
def stand_in(kernels=("wide",)):
    """Layers multiply by `kernels`, `wide` on the CPU too. Gives the rows of its products."""
    rows = []

    def product(x, values, places, bias=None):
        rows.append(len(x))
        return F.linear(x, pack.expand(values, codes_of(places)), bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide24, "unsupported", lambda dtype, device_type: None)
        patch.setattr(wide24, "product", product)
        patch.setattr(products, "candidates", lambda *_: kernels)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        yield rows


def errors(*sizes, **options):
    """`linear_jobs.errors` of a layer that multiplies by `wide`, and the rows of its products."""
    with stand_in() as rows:
        return linear_jobs.errors("block_shock", *sizes, kernel="wide", **options), rows


def lives(options, seed):
    """`follow_jobs.lives` of such a layer, and how many products it made."""
    with stand_in() as rows:
        return *follow_jobs.lives(options | {"kernel": "wide"}, seed), len(rows)


def chosen(folder, times):
    """`ways.answers` of a forward and a backward where a race gives these times."""
    with stand_in(("cusparselt", "wide")), pytest.MonkeyPatch.context() as patch:
        tuning_jobs.stand_ins(patch, folder, times)
        weight, bias, x, dy = linear_jobs.data(128, 192, 24, "fp32")
        layer = METHODS["block_shock"].from_dense(weight, bias, reduce="collective")
        layer(x.requires_grad_()).backward(dy)  # each race runs `wide` alone, then end to end
        answers = ways.answers(layer, 24)
    tuning.forget()
    return list(answers.values())
