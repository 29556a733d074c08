"""The block-sparse kernels are products with the masked weight, exactly, and touch nothing else.

On a GPU, or under Triton's interpreter (see conftest.py).
"""

import pytest
import torch
from hypothesis import example, given, settings

from blockshock.block_sparse import tiles
from blockshock.kernels import block_lists, block_plans
from blockshock.kernels import block_product as kernels
from tests.block_sparse_checks import DEVICE, HALVES, problems, whole

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
MANY = 60 if DEVICE == "cuda" else 6


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def check(problem, plan=None, plan_of_tiles=None, dtype=HALVES[-1]):
    """Y, Z, dX and dW of whole numbers equal the float64 ones to the bit."""
    block, mask, N, K, B = problem
    lists = block_lists.lists(mask)
    w, bias = whole(N, K, dtype=dtype), whole(N, seed=1, dtype=dtype)
    x, dz = whole(B, K, seed=2, dtype=dtype), whole(B, N, seed=3, dtype=dtype)
    values = kernels.gather(w, lists, block)
    masked = w.double() * tiles.expand(mask, (N, K), (block, block))
    assert torch.equal(kernels.expand(values, lists, (N, K)).double(), masked)
    y, z = kernels.product(x, values, lists, N, bias=bias, activation="relu", keep=True, plan=plan)
    true = x.double() @ masked.t() + bias.double()
    assert torch.equal(z.double(), true)
    assert torch.equal(y.double(), true.relu())
    dx, none = kernels.product(dz, values, lists, K, transposed=True, plan=plan)
    assert none is None
    assert torch.equal(dx.double(), dz.double() @ masked)
    found = kernels.gradient(dz, x, lists, block, plan=plan_of_tiles)
    dense = dz.double().t() @ x.double()
    assert torch.equal(found.double(), kernels.gather(dense, lists, block))
    assert all(t.is_contiguous() for t in (y, z, dx, found))


@settings(max_examples=MANY, deadline=None, derandomize=True)
@given(problem=problems())
@example(problem=(128, torch.eye(2, dtype=torch.bool).to(DEVICE), 200, 130, 70))
@example(problem=(256, torch.ones(1, 2, dtype=torch.bool).to(DEVICE), 256, 300, 5))
def test_products_and_the_gradient_at_kept_tiles_are_exact(problem):
    check(problem)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("block", [16, 32])
def test_every_plan_gives_the_same(block, dtype):
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool, device=DEVICE)
    products, tiles_of = block_plans.products(block, 300), block_plans.GRADIENTS[block]
    some = [plan for plan in products if plan.stages == 3] if DEVICE == "cpu" else products
    for plan, plan_of_tiles in zip(some, (tiles_of * len(some))[: len(some)], strict=True):
        check((block, mask, 3 * block - 5, 3 * block - 7, 300), plan, plan_of_tiles, dtype)


@pytest.mark.parametrize("each", [0, 1, 3])
@pytest.mark.parametrize("bytes_of_x", [1, 3 * 64 * 48 * 2, 1 << 30])
def test_parts_of_x_are_taken_in_groups(bytes_of_x, each, monkeypatch):
    monkeypatch.setattr(kernels, "IN_L2", bytes_of_x)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool, device=DEVICE)
    check((16, mask, 48, 48, 300), block_plans.Plan(64, 16, 4, 2, each))


@pytest.mark.parametrize("block", [16, 64])  # 64: the sums are transposed
@pytest.mark.parametrize("each", [0, 2])
def test_a_tile_is_written_in_pieces_where_a_whole_one_has_no_room(each, block, monkeypatch):
    monkeypatch.setattr(kernels, "halves", lambda plan, block: 2)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool, device=DEVICE)
    plan = block_plans.Plan(128, max(block // 2, 16), 4, 3, each)
    check((block, mask, 3 * block - 5, 3 * block - 7, 300), plan)


@pytest.mark.parametrize("group", [4, 5, 16])  # of 16 parts
def test_programs_share_the_work_evenly(group):
    import triton

    from tests.block_items import items_of

    mask = tiles.keep_top(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)), 0.9)
    mask[5] = False
    lists = block_lists.lists(mask.to(DEVICE))
    programs = 132
    most = triton.next_power_of_2(-(-64 * 16 // programs))
    found = torch.empty(programs, most, 4, dtype=torch.int32, device=DEVICE)
    items_of[(programs,)](lists.rows.turns, found, 64, 16, group, programs, lists.kept, ITEMS=most)
    part, line, first, last = found.cpu().long().unbind(-1)
    given = last > first
    assert sorted((16 * line + part)[given].tolist()) == list(range(64 * 16))
    work = (last - first).sum(1)
    assert work.max() <= 1.15 * work.double().mean()


def test_rows_in_pieces_are_summed_in_float32():
    mask = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    plan = block_plans.GRADIENTS[16][0]
    assert block_plans.pieces(1, 2000, plan) > 1
    check((16, mask, 16, 16, 2000))


def test_no_rows_are_no_product_and_no_gradient():
    lists = block_lists.lists(torch.ones(2, 2, dtype=torch.bool, device=DEVICE))
    values = whole(4, 16, 16, dtype=HALVES[0])
    x = values.new_empty(0, 32)
    assert kernels.product(x, values, lists, 30)[0].shape == (0, 30)
    assert not kernels.gradient(x, x, lists, 16).any()


def test_operands_are_read_where_they_lie_or_copied():
    mask = torch.tensor([[True, False], [True, True]], device=DEVICE)
    lists, dtype = block_lists.lists(mask), HALVES[0]
    values, x = whole(3, 16, 16, dtype=dtype), whole(40, 32, seed=1, dtype=dtype)
    expected, _ = kernels.product(x, values, lists, 32)
    for before in (8, 1):  # rows that start at 16 bytes, and not
        wide = x.new_full((40, before + 32 + 8), torch.nan)
        part = wide[:, before : before + 32]
        part.copy_(x)
        assert (kernels._readable(part) is part) == (before == 8)
        assert torch.equal(kernels.product(part, values, lists, 32)[0], expected)
    backwards = x.t().contiguous().t()
    assert torch.equal(kernels.product(backwards, values, lists, 32)[0], expected)
    apart = torch.stack([values, values], -1)[..., 0]
    assert torch.equal(kernels.product(x, apart, lists, 32)[0], expected)
    one = x[:1].expand(40, 32)
    whole_one = kernels.product(one.contiguous(), values, lists, 32)[0]
    assert torch.equal(kernels.product(one, values, lists, 32)[0], whole_one)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter tells of NaN
def test_tiles_that_are_not_kept_are_never_read():
    mask = torch.tensor([[True, False], [False, False]], device=DEVICE)
    lists, dtype = block_lists.lists(mask), HALVES[0]
    values, x = whole(1, 16, 16, dtype=dtype), whole(20, 32, seed=1, dtype=dtype)
    expected, _ = kernels.product(x, values, lists, 32)
    x[:, 16:] = torch.nan
    assert torch.equal(kernels.product(x, values, lists, 32)[0], expected)
    x[3, 2] = torch.nan
    y = kernels.product(x, values, lists, 32, activation="relu")[0]
    assert y.isnan().nonzero().tolist() == [[3, n] for n in range(16)]


def test_a_wrong_list_is_seen():
    mask = torch.eye(3, dtype=torch.bool, device=DEVICE)
    values, x = whole(3, 16, 16, dtype=HALVES[0]), whole(20, 48, seed=1, dtype=HALVES[0])
    right = kernels.product(x, values, block_lists.lists(mask), 48)[0]
    wrong = kernels.product(x, values, block_lists.lists(mask.roll(1, 0)), 48)[0]
    assert not torch.equal(right, wrong)


def test_what_cannot_run_is_refused_with_the_value_and_the_fix(monkeypatch):
    assert "float32" in kernels.unsupported(torch.float32, DEVICE)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "need a GPU" in kernels.unsupported(torch.float16, "cpu")
    for version in ((8, 0), (12, 0)):  # neither has the shared memory of the plans
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_=version: is_)
        assert f"this is {version[0]}.0" in kernels.unsupported(torch.float16, "cuda")
