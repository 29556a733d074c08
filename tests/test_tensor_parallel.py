"""Ranks that compute a decoder together compute what their plan says, forward and backward."""

import pytest

from blockshock.distributed import open_ranks
from blockshock.transformer import sync
from tests import tensor_parallel_jobs as jobs

LIMIT = 2e-5  # relative, of float32 sums in another order


@pytest.fixture(scope="module")
def four():
    with open_ranks(4, "cpu") as pool:
        yield pool


def check(answers, *, vocabulary_parallel=False, limit=LIMIT):
    for answer in answers:
        for plan, found in answer.items():
            syncs = sync.plan(plan, jobs.SIZES["depth"]).syncs
            more = (2, 2) if vocabulary_parallel else (0, 1)
            assert found["collectives"] == (syncs + more[0], syncs + more[1]), plan
            assert found["same"], plan
            for what in ("logits", "loss", "gradients"):
                assert found[what] < limit, (plan, what, found)


def test_every_plan_is_its_simulation_on_the_ranks_of_the_session(ranks):
    check(ranks.run(jobs.all_plans))


def test_every_plan_is_its_simulation_on_four_ranks(four):
    check(four.run(jobs.all_plans))


@pytest.mark.parametrize("size", [2, 4])
def test_with_embedding_and_head_in_parts_as_well(ranks, four, size):
    pool = ranks if size == 2 else four
    check(pool.run(jobs.all_plans, vocabulary_parallel=True), vocabulary_parallel=True)


METHODS = ["naive", "flat", "bucketed", "overlapped", "sharded_optimizer", "torch_ddp"]


@pytest.mark.parametrize("method", METHODS)
def test_beside_data_parallel_ranks_steps_are_those_of_one_process(four, method):
    plan = "selective:[0]" if method == "overlapped" else "spd"
    for norms, error, same in four.run(jobs.trained_like_simulation, method, plan):
        assert norms < LIMIT
        assert error < 10 * LIMIT  # of three steps of AdamW
        assert same


def test_data_parallel_methods_that_would_mix_parts_are_refused(four):
    for mixed, sharded, fsdp in four.run(jobs.refused_methods):
        assert "give group= the ranks that hold the same part" in mixed
        assert "would shard it again; use 'overlapped'" in sharded
        assert "would shard it again" in fsdp
