"""Every wrapper is one process on the whole batch, or one clear error."""

import pytest
import torch
from torch import nn

from blockshock.data_parallel import METHODS
from blockshock.distributed import RankFailure, open_ranks
from tests import data_parallel_jobs as jobs

OURS = ["naive", "flat", "bucketed", "overlapped", "sharded_optimizer", "fully_sharded"]
SYNCHRONISED = [*OURS, "torch_ddp", "torch_fsdp"]
# Relative, of float32 sums in another order: 2.3e-6 at most after five steps, and 1 where the mean
# is not divided.
LIMIT = 1e-5


@pytest.mark.parametrize("method", SYNCHRONISED)
def test_five_steps_are_those_of_one_process_on_the_whole_batch(ranks, method):
    for errors in ranks.run(jobs.like_one_process, method):
        assert max(errors.values()) < LIMIT, errors


@pytest.mark.slow
def test_the_same_on_four_ranks():
    with open_ranks(4, "cpu") as four:
        for method in ("overlapped", "sharded_optimizer", "fully_sharded"):
            for errors in four.run(jobs.like_one_process, method, long=1009):
                assert max(errors.values()) < LIMIT, errors


def test_a_sum_that_is_not_divided_is_seen(ranks):
    for errors in ranks.run(jobs.broken_mean):
        assert max(errors.values()) > 100 * LIMIT


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("sharded_optimizer", "overlapped"),
        ("overlapped", "sharded_optimizer"),
        ("torch_fsdp", "sharded_optimizer"),
        ("fully_sharded", "torch_fsdp"),
        ("sharded_optimizer", "fully_sharded"),
        ("flat", "torch_fsdp"),
        ("torch_ddp", "naive"),
    ],
)
def test_a_saved_run_goes_on_in_another_method(ranks, first, second):
    for errors, other_groups in ranks.run(jobs.saved, first, second):
        assert max(errors) < LIMIT
        assert "make it with the same groups" in other_groups


@pytest.mark.parametrize("method", ["flat", "bucketed", "overlapped"])
def test_gradients_stay_views_of_their_buckets(ranks, method):
    for inside, places, kinds in ranks.run(jobs.views, method):
        assert all(inside)
        assert places == 1
        assert all(len(dtypes) == 1 for dtypes in kinds)


@pytest.mark.parametrize("method", OURS)
def test_unused_parameters_are_named_or_zero(ranks, method):
    answers = ranks.run(jobs.unused, method)
    assert any(right is not None for _, right, _ in answers)
    for text, right, zero in answers:
        assert "no gradient for 2 parameters" in text
        assert "'b.weight'" in text
        assert 'unused="zero"' in text
        assert right is not False
        assert zero


@pytest.mark.parametrize("method", OURS)
def test_what_would_be_wrong_is_refused(ranks, method):
    for said in ranks.run(jobs.refused, method):
        assert said.pop("right") is None
        if method == "naive":  # its gradients are nobody's buffer
            assert said.pop("cast") is None
        assert "without a backward" in said.pop("no backward")
        assert "without a backward" in said.pop("second call")
        assert "without a backward" in said.pop("second call, zero")
        assert said.pop("nothing to train") is None
        assert "call finish_gradient_sync() before step()" in said.pop("step before")
        assert "inside no_sync()" in said.pop("inside no_sync")
        assert "copy its .module" in said.pop("copied")
        assert "no parameter is named 'c'" in said.pop("unknown name")
        assert "in two groups" in said.pop("name twice")
        assert "'a.bias' was frozen" in said.pop("frozen")
        assert "'a.bias' was unfrozen" in said.pop("unfrozen")
        assert "sparse=False" in said.pop("sparse")
        graph = said.pop("graph")
        assert "create_graph" in graph
        assert all(text for text in said.values()), said


RIGHT = ["twice", "reentrant, one segment", "plain, one segment", "plain, two segments",
         "two in no_sync"]  # fmt: skip
LATE_ONLY = ["two backwards", "retained"]


@pytest.mark.parametrize("way", RIGHT)
@pytest.mark.parametrize("method", ["bucketed", "overlapped", "sharded_optimizer", "fully_sharded"])
def test_graphs_that_use_a_parameter_in_unusual_ways_are_right(ranks, method, way):
    for error in ranks.run(jobs.hard_graph, method, way):
        assert error < LIMIT


@pytest.mark.parametrize("way", [*LATE_ONLY, "reentrant, two segments"])
@pytest.mark.parametrize(
    "method", ["naive", "bucketed", "fully_sharded", "overlapped", "sharded_optimizer"]
)
def test_a_gradient_made_again_after_it_was_sent_is_refused(ranks, method, way):
    for answer in ranks.run(jobs.hard_graph, method, way):
        if method in ("naive", "bucketed", "fully_sharded"):
            assert answer < LIMIT
        else:
            assert "was made again after it was sent" in answer


@pytest.mark.parametrize("method", SYNCHRONISED)
def test_ranks_begin_alike_or_all_refuse(ranks, method):
    for said in ranks.run(jobs.construction, method):
        assert said.pop("values") == 0
        assert "no shape yet" in said.pop("lazy")
        assert "meta" in said.pop("meta")
        assert all("the ranks differ in" in text for text in said.values()), said
        assert "rank 0 has [3, 3] float32" in said["shape"]


def test_options_are_checked_on_all_ranks(ranks):
    for differ, size, unused in ranks.run(jobs.options_that_differ):
        assert "the ranks differ in option bucket_mib: rank 0 has 25.0, rank 1 has 26.0" in differ
        assert "bucket_mib = 0: a bucket has more than 0 MiB" in size
        assert "unused = 'skip': use one of error, zero" in unused


def test_a_rank_holds_the_optimizers_state_of_its_share(ranks):
    for fraction, said, no_gradients in ranks.run(jobs.state_of_shares):
        assert fraction < 1 / ranks.size + 0.05
        assert said.pop("Said") is None
        assert no_gradients
        for name, text in said.items():
            assert f"{name}: a rank of sharded_optimizer steps pieces" in text


@pytest.mark.parametrize("method", ["sharded_optimizer", "fully_sharded"])
def test_autograd_sees_the_steps_of_the_pieces(ranks, method):
    for text in ranks.run(jobs.version_counts, method):
        assert "modified by an inplace operation" in text


@pytest.mark.slow
def test_a_rank_that_fails_in_a_step_ends_all(ranks):
    for method in ("overlapped", "sharded_optimizer", "fully_sharded"):
        with pytest.raises(RankFailure, match="no more data"):
            ranks.run(jobs.fails_in_a_step, method)
    assert all(ranks.run(jobs.gone)), "the next pool works, and a wrapper's buckets go with it"


def test_none_works_without_a_process_group_and_the_others_say_so():
    layer = nn.Linear(2, 2)
    model = METHODS["none"](layer)
    sgd = model.optimizer(torch.optim.SGD, lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    model.finish_gradient_sync()
    sgd.step()
    for name, cls in METHODS.items():
        if name != "none":
            with pytest.raises(ValueError, match="needs a process group"):
                cls(layer)


@pytest.mark.parametrize("method", ["overlapped", "sharded_optimizer", "fully_sharded"])
def test_a_compiled_wrapper_is_right(ranks, method):
    for error in ranks.run(jobs.compiled, method):
        assert error < LIMIT


def test_gradients_keep_strides_and_a_second_wrapper_is_noticed(ranks):
    for same, first, second in ranks.run(jobs.layouts):
        assert same
        assert "wrap a module once" in first
        assert second is None


def test_parts_of_weights_are_refused(ranks):
    for text in ranks.run(jobs.parts_of_weights):
        assert "'0.weight' is a PartWeight" in text
