"""What the ranks do in the tests of `tuning`: races whose times are given, and layers on GPUs."""

import contextlib
import logging
import os
import time
from statistics import median

import pytest
import torch
import torch.distributed as dist

from blockshock import cache, tuning
from blockshock.distributed import collectives, symmetric
from blockshock.distributed.ranks import device
from blockshock.linear import METHODS, ways
from blockshock.tuning import race, sizes

MANY = [1 + 10 * number for number in range(200)]  # of rows


class GivenTimes(race.Race):
    """Takes the times it is given in place of measuring; remembers who entered and who ran."""

    times: dict[str, float]
    entered: list[str]
    ran: list[tuple[int, list[str]]]
    unable: dict[str, Exception]

    def __init__(self, device, group=None):
        self.seconds, self.entered, self.ran = {}, [], []
        self.shared, self.elapsed = False, 0.25
        GivenTimes.last = self

    elapsed = None

    def cannot(self, step):
        return self.unable.get(step())

    def enter(self, steps):
        for name, step in steps:
            step()
            self.entered.append(name)
            self.seconds[name] = self.times[name]

    def run(self, names, rounds):
        self.ran.append((rounds, list(names)))


def stand_ins(patch, folder, times=None):
    """Makes `tuning` work without a GPU, in `folder`, by a race of these times."""
    patch.setenv("BLOCKSHOCK_CACHE", str(folder))
    patch.setattr(cache, "device_name", lambda: "Some-GPU")
    patch.setattr(tuning.nvidia_smi, "visible_gpus", lambda fields: ([], None))
    patch.setattr(tuning.nvidia_smi, "links", lambda: ([["X", "NV18"], ["NV18", "X"]], None))
    patch.setattr(tuning, "Race", GivenTimes)
    GivenTimes.times, GivenTimes.unable = {} if times is None else times, {}
    tuning.forget()
    tuning._told.clear()


def asked_in_turn(folder, questions, times):
    """Each rank's answers; rank 1 has another folder, and would not measure."""
    logging.getLogger("blockshock.tuning").setLevel(logging.ERROR)
    rank = collectives.group_rank()
    with pytest.MonkeyPatch.context() as patch:
        stand_ins(patch, f"{folder}/{rank}", times)
        patch.setenv("BLOCKSHOCK_TUNE", "1" if rank == 0 else "0")
        steps = {"kernel": {name: (lambda: None) for name in times}}
        group = torch.distributed.group.WORLD
        found = [tuning.pick(question, steps, device(), group) for question in questions]
    tuning.forget()
    return [(answer.name, answer.source) for answer in found]


def captured_before_its_first_use(method, N, B, **options):
    """(largest error of a captured forward of an unknown size, how it was done)."""
    like = {"dtype": torch.bfloat16, "device": device()}
    torch.manual_seed(0)
    weight, x = torch.randn(N, N, **like), torch.randn(B, N, **like)
    layer = METHODS[method].from_dense(weight, reduce="auto", **options)
    layer(x[:8])  # handles and buffers
    ways._ways.clear()
    ways._ruled.clear()
    tuning.forget()
    graph, found = torch.cuda.CUDAGraph(), {}
    with torch.no_grad(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found["y"] = layer(x)
    graph.replay()
    truth = x.double() @ weight.double().t()
    error = ((found["y"].double() - truth).norm() / truth.norm()).item()
    return (
        error,
        layer.paths(B)["reduce"],
        [question for memory in tuning._memory.all() for question in memory.answers],
    )


def first_use(method, N, B, dtype="bf16", **options):
    """`ways.answers` of a layer's forward and backward, after two calls of each."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    logging.getLogger("blockshock.tuning").setLevel(logging.ERROR)
    like = {"dtype": dtypes[dtype], "device": device()}
    torch.manual_seed(0)
    layer = METHODS[method].from_dense(torch.randn(N, N, **like), reduce="auto", **options)
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        x = torch.randn(B, N, **like).requires_grad_()
        y = layer(x)
        y.backward(torch.ones_like(y))
        outputs.append((y, x.grad))
    same = all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    folder = os.environ.get("BLOCKSHOCK_CACHE")
    return ways.answers(layer, B), layer.paths(B), same, folder


@contextlib.contextmanager
def _asking():
    """A list that grows by one at each question to the first rank; classes of sizes are on."""
    asked, ask = [], dist.broadcast_object_list

    def counted(*arguments, **options):
        asked.append(1)
        return ask(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast_object_list", counted)
        exact = tuning._exact
        tuning.exact_sizes(False)
        yield asked
        tuning.exact_sizes(exact)


def many_sizes(folder):
    """(questions to the first rank in a first and a second loop, entries of the memory, names)."""
    logging.getLogger("blockshock.tuning").setLevel(logging.ERROR)
    times = {"kernel; collective": 2.0, "kernel; exchange, 4 chunks": 1.0}
    steps = {"kernel": {name: (lambda: None) for name in times}}
    group, counts = dist.group.WORLD, []
    with pytest.MonkeyPatch.context() as patch, _asking() as asked:
        stand_ins(patch, f"{folder}/{collectives.group_rank()}", times)
        for _ in range(2):
            found = [tuning.pick(f"loop: B={B} bf16", steps, device(), group) for B in MANY]
            counts.append(len(asked))
            asked.clear()
        memory = tuning._memory.of(group)
        entries = len(memory.answers), len(memory.settled)
    tuning.forget()
    return *counts, entries, {answer.name for answer in found}


def serving_loop(method, N, **options):
    """A loop over `MANY` sizes, forward and backward, twice: what it asked, held and took."""
    logging.getLogger("blockshock.tuning").setLevel(logging.ERROR)
    like = {"dtype": torch.bfloat16, "device": device()}
    torch.manual_seed(0)
    layer = METHODS[method].from_dense(torch.randn(N, N, **like), reduce="auto", **options)
    xs = [torch.randn(B, N, **like).requires_grad_() for B in MANY]

    def loop():
        times = []
        for x in xs:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            y = layer(x)
            torch.autograd.grad(y, x, torch.ones_like(y))
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        return times

    with _asking() as asked:
        first = sum(loop()) / 1e3
        found = {"asked": len(asked), "classes": len({sizes.span(B) for B in MANY})}
        found["first loop s"] = first
        asked.clear()
        before = symmetric.held_bytes(), torch.cuda.memory_reserved()
        times = loop()
        after = symmetric.held_bytes(), torch.cuda.memory_reserved()
        found["asked again"] = len(asked)
    found["symmetric"], found["reserved"] = zip(before, after, strict=True)
    return found | {"median ms": median(times), "largest ms": max(times)}
