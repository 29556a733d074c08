"""Sparse layers under data parallelism: ranks with other masks are refused, others train alike."""

import pytest

from tests import block_sparse_jobs as jobs


@pytest.mark.parametrize("wrapper", ["ddp", "overlapped"])
@pytest.mark.parametrize("storage", ["bsr", "semi_structured"])
def test_ranks_train_together_where_their_masks_agree_and_else_are_refused(
    cpu_ranks, storage, wrapper
):
    assert cpu_ranks.run(jobs.wrapped, storage, wrapper, True) == [True, True]
    for said in cpu_ranks.run(jobs.wrapped, storage, wrapper, False):
        assert "holds other entries of the weight of layer '0' than rank 0" in said
