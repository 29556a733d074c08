"""What is measured on four and eight GPUs is right on as many ranks."""

import pytest
import torch

from blockshock.distributed import open_ranks
from tests import data_parallel_jobs, hybrid_jobs, tensor_parallel_jobs
from tests.test_data_parallel import LIMIT
from tests.test_hybrid import check as check_blocks
from tests.test_hybrid import every
from tests.test_tensor_parallel import check as check_plans

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[4, 8])
def many(request):
    with open_ranks(request.param, "cpu") as pool:
        yield pool


def test_every_plan_is_its_simulation_and_leaves_equal_replicas(many):
    check_plans(many.run(tensor_parallel_jobs.all_plans, heads=8))


@pytest.mark.parametrize(
    "method", ["overlapped", "sharded_optimizer", "fully_sharded", "torch_ddp"]
)
def test_five_steps_are_those_of_one_process_on_the_whole_batch(many, method):
    for errors in many.run(data_parallel_jobs.like_one_process, method, long=1009):
        assert max(errors.values()) < LIMIT, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_hybrid_block_is_the_dense_one(many, dtype):
    names = "none", "window", "blocks_per_head"
    check_blocks(every(many.run(hybrid_jobs.every_pattern, dtype, names=names)))
