"""Few queries over many keys: keys are split over programs, and results are exact."""

import pytest
import torch

from blockshock.attention import METHODS
from blockshock.kernels import flash, flash_plans
from tests.attention_checks import DEVICE, DTYPES, check, problem, results

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
METHOD = METHODS["flash_triton"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# (batch, heads, kv_heads, Tq, Tk, D), pieces
SPLIT = [
    ((1, 1, 1, 1, 513, 16), 2),
    ((1, 2, 2, 63, 1000, 24), 3),
    ((1, 1, 1, 65, 777, 16), 3),
    ((1, 4, 2, 3, 600, 40), 2),
    ((2, 4, 2, 1, 1025, 16), 4),
    ((1, 1, 1, 2, 4250, 16), 15),
]


@pytest.mark.parametrize("causal", [False, "bottom_right"])
@pytest.mark.parametrize(("sizes", "pieces"), SPLIT, ids=str)
def test_pieces_of_keys_match_float64(sizes, pieces, causal):
    B, H, kv, Tq, Tk, D = sizes
    rows = H // kv * Tq
    shape = (B, kv, rows, D) if rows <= 64 and (not causal or Tq == 1) else (B, H, Tq, D)
    assert flash_plans.split(shape, torch.float32, Tk)[1] == pieces
    check(METHOD, problem(*sizes), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_pieces_of_every_plan_match_float64(dtype, D):
    check(METHOD, problem(1, 2, 1, 5, 600, D, dtype), causal="bottom_right", scale=0.2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter tells of NaN
def test_keys_behind_the_last_are_not_read_by_any_piece():
    q, k, v, _ = problem(1, 2, 2, 3, 700, 16)
    expected = METHOD(q, k, v)
    longer = [torch.nn.functional.pad(x, (0, 0, 0, 60), value=torch.nan) for x in (k, v)]
    longer = [x[:, :, :700] for x in longer]
    assert torch.equal(METHOD(q, *longer), expected)
    assert torch.equal(METHOD(q, *longer), expected)  # the same bits again


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_pieces_without_a_score_have_no_weight():
    q, k, v, _ = problem(1, 1, 1, 2, 1024, 16)
    q[..., 0], k[:, :, 300:, 0] = 1.0, -torch.inf
    out = METHOD(q, k, v)
    assert torch.allclose(out, METHOD(q, k[:, :, :300], v[:, :, :300]), atol=1e-6)


def test_lse_and_gradients_are_those_of_one_piece(monkeypatch):
    given = problem(1, 4, 2, 3, 900, 16)
    lse = flash.forward(*given[:3], scale=0.25)[1]
    made = results(METHOD, *given)
    monkeypatch.setattr(flash_plans, "LEAST", 10**6)
    assert flash_plans.split(given[0].shape, torch.float32, 900)[1] == 1
    assert torch.allclose(lse, flash.forward(*given[:3], scale=0.25)[1], atol=1e-5)
    for one, other in zip(made, results(METHOD, *given), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_rule_of_pieces_fills_the_processors_and_leaves_squares_alone():
    pieces = {
        (1, 32, 1, 4096): 8,  # 256 programs, two for each of 132 processors
        (1, 32, 128, 4096): 4,
        (8, 32, 1, 65536): 1,  # full without
        (1, 8, 1, 4096): 15,  # of 256 keys or more
        (1, 4, 2048, 2048): 1,
        (1, 1, 1, 511): 1,
        (1, 1, 1, 1 << 20): 117,
    }
    for (B, H, Tq, Tk), expected in pieces.items():
        assert flash_plans.split((B, H, Tq, 128), torch.bfloat16, Tk)[1] == expected


def test_pieces_lie_on_the_device_of_the_inputs():
    assert METHOD(*problem(1, 1, 1, 1, 600, 16)[:3]).device.type == DEVICE
