"""What the ranks do in the tests of `tuning`: races whose times are given, and layers on GPUs."""

import logging
import os

import torch

from blockshock import cache, tuning
from blockshock.distributed import collectives
from blockshock.distributed.ranks import device
from blockshock.linear import METHODS, ways
from blockshock.tuning import race


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
    GivenTimes.times, GivenTimes.unable = times or {}, {}
    tuning.forget()
    tuning._told.clear()


def asked_in_turn(folder, questions, times):
    """Each rank's answers; rank 1 has another folder, and would not measure."""
    import pytest

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
        [question for of in tuning._answers.values() for question in of],
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
