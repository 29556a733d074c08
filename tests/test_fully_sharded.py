"""Sharded parameters: equal to one process, and no more memory and messages than they must."""

import pytest
import torch

from blockshock.distributed import Ranks
from tests import fully_sharded_jobs as jobs

CLOSE = 2e-5  # float32, summed in another order


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
