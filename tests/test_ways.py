"""A way that was chosen for one layer is not taken for another one, and a rule is told as one."""

import pytest
import torch

from blockshock import tuning
from blockshock.distributed import collectives, reduce
from blockshock.distributed.groups import ByGroup
from blockshock.kernels import products
from blockshock.linear import METHODS, ways
from blockshock.tuning import sizes
from tests import tuning_jobs


class OnGPU:
    """So many rows on a GPU, where there is none."""

    dtype, device, is_cuda = torch.float32, torch.device("cuda", 0), True

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows


@pytest.fixture
def two_ranks(monkeypatch):
    """The first of two ranks, which are not there."""
    monkeypatch.setattr(collectives, "group_size", lambda group=None: 2)
    monkeypatch.setattr(collectives, "group_rank", lambda group=None: 0)
    for home, name, made in (
        (ways, "_ways", dict),
        (ways, "_ruled", dict),
        (tuning, "_memory", tuning.Memory),
    ):
        monkeypatch.setattr(home, name, ByGroup(made))


def chosen(layer, side, like):
    return ways._chosen(layer, side, like, None, None, None)


def test_free_masks_with_and_without_a_transpose_ask_apart(two_ranks):
    x = torch.zeros(8, 64)
    kernels = {}
    for mask in ("random", "tile_magnitude"):
        layer = METHODS["block_shock"].from_dense(torch.randn(64, 64), mask=mask)
        kernels[mask] = chosen(layer, ways.BACKWARD, x).kernel
    assert kernels == {"random": None, "tile_magnitude": "plain"}


def test_a_capture_goes_by_rule_and_says_so_though_the_cpu_was_used_before(two_ranks, monkeypatch):
    layer = METHODS["dense_tp_row"].from_dense(torch.randn(64, 64), reduce="auto")
    cpu = chosen(layer, ways.FORWARD, torch.zeros(8, 64))
    assert cpu.plan.reason == "the ranks have no GPUs"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    way = chosen(layer, ways.FORWARD, OnGPU(8))
    assert way.plan.reason == ""
    told = ways._told(*ways._known(layer, ways.FORWARD, OnGPU(8)))
    assert told == "collective (by rule: a graph was being captured)"


def test_no_rows_have_one_way(two_ranks, monkeypatch):
    layer = METHODS["block_shock"].from_dense(torch.randn(64, 64))
    monkeypatch.setattr(products, "candidates", lambda *_: ("thin", "cusparselt"))
    assert len(ways.candidates(layer, ways.FORWARD, OnGPU(0))) == 1


def test_the_stand_in_copies_no_hooks(two_ranks):
    class Trainer:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def hook(self, *_):
            pass

    for master in ("packed", "float32", "dense"):
        made = METHODS["block_shock"].from_dense
        layer = made(torch.randn(64, 64), torch.randn(64), master=master)
        layer.register_forward_hook(Trainer().hook)
        with torch.inference_mode():  # a race may begin in it
            twin = layer.in_dtype(torch.bfloat16)
        assert twin.packed.values.dtype == torch.bfloat16
        assert torch.equal(twin.packed.values, layer.packed.values.bfloat16())
        assert twin.kind == layer.kind
        assert not twin._forward_hooks


def test_each_size_takes_a_way_that_it_has_and_few_of_them_ask(two_ranks, monkeypatch, tmp_path):
    tuning_jobs.stand_ins(monkeypatch, tmp_path, Ever())
    monkeypatch.setattr(reduce.symmetric, "why_not", lambda group=None: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked = []

    def idle(way):
        return lambda: None

    monkeypatch.setattr(tuning, "_of_first", lambda value, group: asked.append(1) or value)
    layer = METHODS["dense_tp_row"].from_dense(torch.randn(64, 64), reduce="auto")
    for _ in range(2):
        for rows in tuning_jobs.MANY:
            like = OnGPU(rows)
            way = ways._chosen(layer, ways.FORWARD, like, idle, idle, None)
            assert way in ways.candidates(layer, ways.FORWARD, like)
    assert len(asked) == len({sizes.span(rows) for rows in tuning_jobs.MANY})


class Ever(dict):
    """Times of a race: the more chunks the faster."""

    def __missing__(self, name):
        return 1.0 - 0.01 * sum(int(word) for word in name.split() if word.isdecimal())
