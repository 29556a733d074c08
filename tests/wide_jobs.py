"""A stand-in for the wide kernel where there is no GPU, and what the ranks do with it.

It takes the kernel's own operands, puts W together again from them, and multiplies densely. Copies
leave no trace in version counters, as those of a kernel do not.
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


def values_of(arranged):
    """The inverse of `wide24.arrange_reference`."""
    tiles, steps, _, _ = arranged.shape
    split = arranged.view(tiles, steps, 4, 8, 4, 2, 2, 2)  # t, k, w, g, q, u, half, e
    return split.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(tiles * 64, steps * 16)


def write(source, out):
    """Copies without a trace."""
    target, source = (t.detach().view(torch.uint8).numpy() for t in (out, source))
    target[...] = source
    return out


def transpose_kept(values, codes, codes_t, out):
    """That of `pack`, as the kernel does it."""
    return write(pack.transpose_kept_reference(values, codes, codes_t), out)


class Calls:
    """How often the stand-in arranged values, and how many rows each of its products had."""

    def __init__(self):
        self.arranged, self.rows = 0, []

    def arrange(self, values, out=None):
        self.arranged += 1
        found = wide24.arrange_reference(values)
        return found if out is None else write(found, out)

    def product(self, x, values, places, bias=None, plan=None):
        self.rows.append(len(x))
        kept = values_of(values) if plan.arranges else values
        return F.linear(x, pack.expand(kept, codes_of(places)), bias)


@contextlib.contextmanager
def stand_in(plan="direct", kernels=("wide",)):
    """Layers multiply by `kernels`, and `wide` runs by this plan on the CPU. Gives the `Calls`."""
    calls = Calls()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide24, "USUAL", wide24.PLANS[plan])
        patch.setattr(wide24, "unsupported", lambda dtype, device_type: None)
        patch.setattr(wide24, "arrange", calls.arrange)
        patch.setattr(wide24, "product", calls.product)
        patch.setattr(products, "candidates", lambda *_: kernels)
        patch.setattr(pack, "transpose_kept", transpose_kept)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        yield calls


def errors(plan, *sizes, **options):
    """`linear_jobs.errors` of a layer that multiplies by `wide`, and the rows of its products."""
    with stand_in(plan) as calls:
        found = linear_jobs.errors("block_shock", *sizes, kernel="wide", **options)
    return found, calls.rows


def lives(plan, options, seed):
    """`follow_jobs.lives` of such a layer."""
    with stand_in(plan) as calls:
        return *follow_jobs.lives(options | {"kernel": "wide"}, seed), calls.arranged


def chosen(folder, times, *, plan="direct", trained=True):
    """(`ways.answers` of a forward and a backward where a race gives these times, how often values
    were arranged meanwhile).
    """
    with stand_in(plan, kernels=("cusparselt", "wide")) as calls, pytest.MonkeyPatch.context() as p:
        tuning_jobs.stand_ins(p, folder, times)
        weight, bias, x, dy = linear_jobs.data(128, 192, 24, "fp32")
        layer = METHODS["block_shock"].from_dense(weight, bias, reduce="collective")
        layer.weight.requires_grad_(trained)
        layer(x.requires_grad_()).backward(dy)  # each race runs `wide` alone, then end to end
        answers = ways.answers(layer, 24)
    tuning.forget()
    return list(answers.values()), calls.arranged


def renewed_at_once():
    """Whether `upkeep` of a frozen layer renews what a graph may have captured, in its memory."""
    with stand_in():
        weight, bias, x, _ = linear_jobs.data(128, 192, 24, "fp32")
        layer = METHODS["block_shock"].from_dense(weight, bias, kernel="wide")
        layer.requires_grad_(False)
        x.requires_grad_()
        layer(x).sum().backward()
        operands = [layer.packed._wide, layer.packed.transposed._wide]
        held = [operand._arranged for operand in operands]
        layer.weight.data.mul_(3)
        layer.upkeep()
        return [
            operand._arranged is memory and torch.equal(values_of(memory), operand.values)
            for operand, memory in zip(operands, held, strict=True)
        ]
