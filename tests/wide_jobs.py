"""A stand-in for the wide kernel where there is no GPU, and what the ranks do with it.

It takes the kernel's own operands, puts W together again from them, and multiplies densely.
"""

import contextlib
import random
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from blockshock import masks, tuning
from blockshock.distributed import collectives, reduce
from blockshock.distributed.ranks import device
from blockshock.distributed.reduce import Plan
from blockshock.kernels import pack, products, wide24
from blockshock.linear import METHODS, ways
from blockshock.measure.clock import capture
from blockshock.packed import Packed24
from tests import follow_jobs, linear_jobs, tuning_jobs
from tests.reduce_jobs import lag
from tests.sparse24_cases import poison


def codes_of(places):
    """The inverse of `wide24.arrange_places`."""
    tiles, blocks, _ = places.shape
    shifts = torch.arange(0, 32, 4).view(2, 4)  # half, j
    words = places.view(tiles, blocks, 4, 8, 2, 2, 1, 1)  # t, b, w, g, s, u
    codes = (words >> shifts & 15).permute(0, 2, 6, 3, 1, 4, 5, 7)
    of_a = codes.reshape(tiles * 4, 16, blocks * 16).to(torch.uint8)
    found = torch.empty_like(of_a)
    found[:, wide24.ROWS_OF_W] = of_a
    return found.view(tiles * 64, blocks * 16)


@contextlib.contextmanager
def stand_in(kernels=("wide",)):
    """Layers multiply by `kernels`, `wide` on the CPU too. Gives the rows of its products."""
    rows = []

    def product(x, values, places, bias=None, partials=None):
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


BY_TILES = Plan("exchange", by_tiles=True)


class Sum:
    """X Wᵀ + b of a rank's own W, with the same X on all; b of the first rank alone."""

    def __init__(self, N, K, B, dtype=torch.bfloat16, seed=0):
        generator = torch.Generator(device()).manual_seed(seed)
        self.x = torch.randn(B, K, generator=generator, device=device()).to(dtype)
        generator.manual_seed(seed + 1 + dist.get_rank())
        weight = torch.randn(N, K, generator=generator, device=device()).to(dtype)
        self.form = Packed24.pack(weight, masks.make("random", weight))
        bias = torch.randn(N, generator=generator, device=device()).to(dtype)
        self.bias = None if dist.get_rank() else bias

    def begin(self):
        product = partial(self.form.product, bias=self.bias, kernel="wide")
        return reduce.begin_sum(product, self.x, BY_TILES)

    def problem(self, found):
        """What is wrong, or None: the sum has the bits of the ranks' own products, added."""
        own = self.form.product(self.x, self.bias, "wide")
        terms = collectives.all_gather(own, None)
        exact = sum(term.float() for term in terms).to(own.dtype)
        wrong = int((found != exact).sum())
        what = f"{list(found.shape)}, K={self.x.shape[1]}, {found.dtype}"
        return f"{what}: {wrong} entries are wrong" if wrong or found.isnan().any() else None


def sums(sizes, seed):
    """What is wrong with sums of these sizes, in an order by `seed`, one after the other without a
    wait, and one rank or the other behind."""
    order = [size for size in sizes for _ in range(3)]
    random.Random(seed).shuffle(order)
    dtypes = (torch.bfloat16, torch.float16)
    cases = [Sum(*size, dtypes[n % 2], seed=100 * seed + n) for n, size in enumerate(order)]
    found = []
    for number, case in enumerate(cases):
        poison()
        lag(random.Random(number).choice((0, 1_000_000, 10_000_000)), number)
        found.append(case.begin().wait())
    problems = [case.problem(y) for case, y in zip(cases, found, strict=True)]
    return [problem for problem in problems if problem]


def captured_sums():
    """The same of graphs that are replayed in turn with each other and with eager sums."""
    cases, results, problems = [Sum(704, 960, 333), Sum(1024, 2048, 1000, seed=7)], {}, []

    def step(number):
        results[number] = cases[number].begin().wait()

    for number in range(2):
        step(number)  # makes the buffers
    graphs = [capture(partial(step, number)) for number in range(2)]
    replayed = dict(results)
    for turn in range(6):
        for number in (0, 1, 1) if turn % 2 else (1, 0):
            cases[number].form.values.mul_(-1)
            replayed[number].fill_(torch.nan)
            lag(3_000_000, turn + number)
            graphs[number].replay()
            problems.append(cases[number].problem(replayed[number]))
            step(turn % 2)
            problems.append(cases[turn % 2].problem(results[turn % 2]))
    return [problem for problem in problems if problem]


def errors_by_tiles(*sizes, **options):
    """`linear_jobs.errors` of a layer whose forward sums by tiles, and how it says that it did."""
    found, plans = [], reduce.plans

    def by_tiles(*args, **asked):
        possible = plans(*args, **asked)
        found.append(BY_TILES in possible)
        return [BY_TILES] if BY_TILES in possible else possible

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce, "plans", by_tiles)
        options = {"kernel": "wide", "reduce": "exchange"} | options
        return linear_jobs.errors("block_shock", *sizes, **options), found
