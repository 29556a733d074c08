"""What trainers do without asking the wrapper: right on every rank, or one clear error."""

import pytest

from tests import data_parallel_use_jobs as jobs
from tests.test_data_parallel import LIMIT, OURS, SYNCHRONISED


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", SYNCHRONISED)
def test_an_optimizer_made_directly_is_right_or_refused(ranks, method, when):
    if method == "torch_fsdp" and when == "before":
        pytest.skip("fully_shard replaces the parameters, so such an optimizer has none of them")
    for answer in ranks.run(jobs.made_directly, method, when, fused=False):
        if method == "sharded_optimizer":
            assert "optimizer(cls, ...)" in answer
        else:
            assert answer < LIMIT


@pytest.mark.parametrize("method", OURS)
def test_it_must_not_step_before_the_gradients_are_finished(ranks, method):
    for said in ranks.run(jobs.not_finished, method):
        wanted = "made directly" if method == "sharded_optimizer" else "call finish_gradient_sync()"
        assert wanted in said


def test_it_must_not_need_whole_matrices_where_they_are_sharded(ranks):
    for said in ranks.run(jobs.whole_matrices, "fully_sharded"):
        assert all("stepped by itself" in text for text in said)


@pytest.mark.parametrize("method", SYNCHRONISED)
def test_torchs_clipping_is_of_the_whole_gradient_or_refused(ranks, method):
    for first, second in ranks.run(jobs.clipped, method):
        if method == "sharded_optimizer":
            assert "clip_grad_norm_(max_norm)" in first
            assert "not that of the whole" in second
        else:
            assert max(first, second) < LIMIT


@pytest.mark.parametrize("method", OURS)
def test_a_scaler_skips_a_step_on_all_ranks_or_is_refused(ranks, method):
    for seen in ranks.run(jobs.scaled, method):
        if method == "sharded_optimizer":
            assert "bfloat16 instead of a GradScaler" in seen
        else:
            assert seen == [(True, 8.0), (False, 4.0), (True, 4.0)]


@pytest.mark.parametrize("method", OURS)
def test_a_copy_is_right_or_refused(ranks, method):
    for said in ranks.run(jobs.copies, method):
        assert "copy its .module" in said["average"]
        assert "copy its .module" in said["save"]
        assert said["values"] == 0  # of shares as well: an average of them is elementwise
        if method == "fully_sharded":
            assert "wrap again" in said["forward"]
        else:
            assert said["forward"] is None


@pytest.mark.parametrize("method", SYNCHRONISED)
def test_uneven_accumulation_two_losses_and_evaluation(ranks, method):
    for errors, calls in ranks.run(jobs.daily, method):
        assert max(errors.values()) < LIMIT, errors
        assert calls == 3


def test_a_loss_must_not_read_shares_outside_of_a_forward(ranks):
    for said in ranks.run(jobs.outside_forward):
        assert "outside of its module's forward" in said
