"""Sharded parameters: equal to one process, and no more memory and messages than they must."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blockshock.data_parallel.shards import Flat, Wire
from blockshock.data_parallel.units import units_of
from blockshock.distributed import Ranks
from tests import fully_sharded_jobs as jobs
from tests import sharded_use_jobs as uses

# float32, summed in another order; a GPU's products of another size are other kernels too.
CLOSE = 1e-4 if torch.cuda.is_available() else 3e-6


@pytest.fixture(scope="module")
def four():
    with Ranks(4, device="cpu") as ranks:
        yield ranks


@pytest.fixture(params=[2, 4])
def some(request, ranks):
    return ranks if request.param == 2 else request.getfixturevalue("four")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("cls", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})],
)
def test_five_steps_equal_one_process_on_the_whole_batch(some, cls, options, frozen):
    for errors in some.run(jobs.five_steps, cls, options, frozen=frozen):
        assert max(errors) < CLOSE, errors


@pytest.mark.parametrize("kind", ["plain", "reentrant"])
@pytest.mark.parametrize("where", ["again", "outside"])
def test_what_is_computed_again_in_backward_finds_whole_parameters(ranks, where, kind):
    for error, freed in ranks.run(jobs.recomputed, **{where: kind}):
        assert error < CLOSE
        assert freed


@pytest.mark.parametrize("reshard", [True, False])
def test_gradients_of_several_backwards_and_forwards_add_up(ranks, reshard):
    for errors, refused, again in ranks.run(jobs.accumulated, reshard_after_forward=reshard):
        assert max(errors) < CLOSE, errors
        assert "no_sync" in refused
        assert "without a backward" in again


def test_a_step_makes_no_more_collectives_than_units(ranks):
    units = 3 + 1
    for found in ranks.run(jobs.counted):
        # Each unit for the forward, each block again for its backward; in the first step the block
        # that runs last is not known.
        first, second, evaluation, third = found
        assert first == (units + 3, units)
        assert second == third == (units + 2, units)
        assert evaluation == (units, 0)
    for found in ranks.run(jobs.counted, reshard_after_forward=False):
        assert found == [(units, units), (units, units), (units, 0), (units, units)]


def test_a_rank_holds_its_share_of_bytes(some):
    for held in some.run(jobs.held):
        share = held["whole"] / some.size
        assert share <= held["parameters"] < 1.1 * share  # it begins each parameter at 64 entries
        assert held["gathered"] == 0
        assert held["gathered at most"] < 0.85 * held["whole"]  # the root, and two of three blocks
        assert held["gradients"] < 1.1 * share
        assert held["state"] < 2.2 * share


def test_a_forward_that_raises_leaves_a_model_that_trains(ranks):
    for error, freed, shares in ranks.run(uses.after_an_error):
        assert error < CLOSE
        assert all(freed)
        assert shares


def test_unused_parameters_are_an_error_or_zero(ranks):
    for (first, second, both), zero, without in ranks.run(uses.unused):
        missing = ["list.2.bias", "list.2.weight", "two.bias", "two.weight"]
        assert all(repr(name) in first for name in missing)
        assert "'one.weight'" not in first
        assert not second
        assert zero == missing
        assert not without
        assert "'list.2.weight'" in both
        assert "'two.weight'" not in both


def test_gradients_of_inputs_alone_leave_the_parameters_without(ranks):
    for error, none in ranks.run(uses.of_inputs):
        assert error < CLOSE
        assert none


def test_what_cannot_be_right_is_refused(ranks):
    for said in ranks.run(uses.refused):
        assert "unused = 'no'" in said["unused"]
        assert "use torch.bfloat16" in said["compute_dtype"]
        assert "LSTM" in said["lstm"]
        assert "sparse=False" in said["sparse"]
        assert "the shape [1]" in said["scalar"]
        assert "stepped by itself" in said["lbfgs"]
        assert "'head.bias' has shape [21], the model's has [37]" in said["shape"]
        assert "finish_gradient_sync()" in said["step"]
        assert "call backward()" in said["grad"]
        assert "'head.bias' was frozen" in said["frozen"]
        assert not said["none"]
        assert "wrap a module once" in said["wrapped twice"]
        assert "a parameter 'bias' was replaced" in said["replaced"]
        assert "was moved or cast" in said["cast"]


@pytest.mark.parametrize("to", ["none", "fully_sharded"])
@pytest.mark.parametrize("start", ["none", "fully_sharded"])
def test_what_was_saved_resumes_under_another_method_and_number_of_ranks(ranks, four, start, to):
    first = four.run(jobs.resumed, start, 0)[1]
    ended = four.run(jobs.resumed, start, 2, first[:2])[1]
    for state, optimizer, losses in ranks.run(jobs.resumed, to, 2, first[:2]):
        assert losses == pytest.approx(ended[2], abs=CLOSE)
        assert jobs.far(state, ended[0]) < CLOSE
        assert list(optimizer["state"]) == list(ended[1]["state"])
        for name, values in optimizer["state"].items():
            assert {k: v.shape for k, v in values.items()} == {
                k: v.shape for k, v in ended[1]["state"][name].items()
            }
            assert jobs.far(values, ended[1]["state"][name]) < 10 * CLOSE


def test_bfloat16_under_float32_masters_is_as_near_as_torchs(ranks):
    for own, torchs, wide in ranks.run(jobs.against_torch):
        assert 1e-4 < own < 1.2 * torchs  # it is bfloat16
        assert wide


@pytest.mark.parametrize("how", ["blocks", "blocks before", "whole"])
def test_a_compiled_model_has_the_gradients_and_compiles_once(ranks, how):
    for error, graphs in ranks.run(uses.compiled, how, timeout=300):
        assert error < CLOSE
        assert graphs[0] > 0
        assert graphs[0] == graphs[-1], graphs


@pytest.mark.parametrize("kind", uses.STACKS)
def test_blocks_used_in_other_ways_have_the_gradients_and_are_freed(ranks, kind):
    for errors, freed in ranks.run(uses.stacked, kind):
        assert max(errors) < CLOSE, errors
        assert all(freed)


def test_outputs_without_gradients_are_those_of_the_parameters_at_that_time(ranks):
    for errors in ranks.run(jobs.evaluated):
        assert max(errors) < CLOSE, errors


def test_the_countof_a_group_share_a_module_without_blocks(four):
    assert max(four.run(uses.in_a_group)) < CLOSE


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [(1,), (0, 5, 0), (63, 64, 65, 1000), (1000, 1)])
def test_the_shares_are_disjoint_and_together_the_parameters(sizes, count):
    whole = [torch.randn(size) for size in sizes]
    found = [[] for _ in sizes]
    for rank in range(count):
        wire = SimpleNamespace(ranks=count, rank=rank, device=torch.device("cpu"))
        named = {str(i): nn.Parameter(p.clone()) for i, p in enumerate(whole)}
        flat = Flat(named, torch.bfloat16, wire)
        for i, p in enumerate(flat.params):
            assert torch.equal(p, flat.cut(i, whole[i]))
            found[i].append(p.detach())
        assert all(view.data_ptr() % 128 == 0 for view in flat.views)
    assert all(torch.equal(torch.cat(f), p) for f, p in zip(found, whole, strict=True))


class Expert(nn.Module):
    """A block with a list of its own, longer than the list of blocks."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.common = nn.Linear(4, 4)

    def forward(self, x):
        return self.common(x)


def test_units_are_the_blocks_and_the_root_with_what_is_tied():
    module = nn.Module()
    module.blocks = nn.ModuleList(Expert() for _ in range(3))
    module.heads = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4)]) for _ in range(2))
    module.blocks[1].common.weight = module.blocks[0].common.weight
    module.blocks[2].common.bias = module.heads[0][0].bias = nn.Parameter(torch.zeros(4))
    names = {p: name for name, p in module.named_parameters()}
    root, *blocks = units_of(module, None, Wire(None, torch.device("cpu")))
    assert [unit.module for unit in blocks] == list(module.blocks)
    assert {names[p] for p in root.params} == {
        "blocks.0.common.weight", "blocks.2.common.bias",
        "heads.0.0.weight", "heads.1.0.weight", "heads.1.0.bias",
    }  # fmt: skip
    assert sum(len(unit.params) for unit in (root, *blocks)) == len(names)


@pytest.mark.gpus(2)
def test_gradients_are_right_whoever_is_late(ranks):
    for errors in ranks.run(uses.delayed):
        assert max(errors) < CLOSE, errors


@pytest.mark.gpus(2)
def test_the_peak_of_memory_is_fully_shards_and_does_not_grow(ranks):
    for peaks in ranks.run(uses.peaks):
        own, torchs = peaks["own"], peaks["torch"]
        assert own[1] == own[2] == own[3]
        assert own[3] <= 1.01 * torchs[3], peaks
