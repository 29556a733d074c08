"""FlashAttention in Triton is exact attention: forward, gradients, what it saves and refuses.

On a GPU, or under Triton's interpreter (see conftest.py).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockshock.attention import METHODS, FlashAttentionTorch, FlashAttentionTriton, unsupported
from blockshock.kernels import flash as kernels
from blockshock.kernels import flash_plans
from tests.attention_checks import DEVICE, DTYPES, check, problem, relative, results, truth

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
flash = METHODS["flash_triton"]

# (batch, heads, kv_heads, Tq, Tk, D)
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 2, 2, 63, 63, 32),
    (1, 4, 2, 40, 90, 48),
    (1, 2, 1, 90, 40, 64),
    (1, 1, 1, 130, 1, 16),
    (1, 1, 1, 1, 130, 24),
    (1, 1, 1, 70, 100, 256),
]
if DEVICE == "cuda":
    SHAPES += [(2, 4, 2, 1000, 1000, 128), (1, 2, 2, 300, 1000, 64), (1, 2, 1, 200, 333, 256)]
    SHAPES += [(4, 16, 16, 512, 512, 64), (4, 16, 4, 515, 1030, 128)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_match_float64(shape, causal, dtype):
    check(flash, problem(*shape, dtype=dtype), causal=causal)


@settings(max_examples=40 if DEVICE == "cuda" else 12, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_matches_float64(data):
    Tq, Tk = (data.draw(st.integers(1, 150)) for _ in range(2))
    groups, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    D = data.draw(st.sampled_from([16, 24, 40, 64]))
    given = problem(1, groups * group, groups, Tq, Tk, D, seed=Tq * Tk)
    check(
        flash, given, causal=data.draw(st.booleans()), scale=data.draw(st.sampled_from([None, 2.0]))
    )


@pytest.mark.parametrize("causal", [False, True])
def test_two_runs_give_the_same_bits(causal):
    given = problem(2, 4, 2, 90, 130, 32, torch.float16)
    runs = [results(flash, *given, causal=causal) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dims", [4, 3])
def test_one_tensor_of_rows_is_saved_the_natural_log_sum_exp(dims):
    q, k, v, _ = problem(2, 1, 1, 70, 50, 16)
    if dims == 3:
        q, k, v = (x[:, 0] for x in (q, k, v))
    out = FlashAttentionTriton.apply(*(x.requires_grad_() for x in (q, k, v)), True)
    saved = out.grad_fn.saved_tensors
    (lse,) = (x for x in saved if x.shape == q.shape[:-1])
    assert len(saved) == 5
    scores = q.double() @ k.double().mT * 16**-0.5
    scores = scores.masked_fill(torch.ones(70, 50, device=DEVICE).tril() == 0, -torch.inf)
    assert relative(lse, scores.logsumexp(-1)) < 1e-6
    assert relative(out, FlashAttentionTorch.apply(q, k, v, True).double()) < 1e-5


def test_strided_inputs_are_read_where_they_lie_and_others_copied():
    given = problem(2, 2, 2, 70, 70, 32)
    expected = results(flash, *given, causal=True)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]  # [B, T, H, D] within
    inside = [torch.nn.functional.pad(x, (4, 4, 3, 0))[:, :, 3:, 4:-4] for x in given]
    backwards = [x.mT.contiguous().mT for x in given]
    for other, where_they_lie in ((apart, True), (inside, True), (backwards, False)):
        assert all((kernels._readable(x) is x) == where_they_lie for x in other)
        found = results(flash, *other, causal=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    q, k, v, d_out = given
    shared, summed = k[:, :1].expand_as(k), d_out.sum(3, keepdim=True).expand_as(d_out)
    found, true = results(flash, q, shared, v, summed), truth(q, shared, v, summed)
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize(("Tq", "Tk"), [(0, 5), (5, 0), (0, 0)])
def test_without_tokens_nothing_is_attended(Tq, Tk):
    given = problem(1, 2, 2, Tq, Tk, 16)
    for own, like in zip(results(flash, *given), (given[3], *given[:3]), strict=True):
        assert own.shape == like.shape
        assert not own.any()


def test_large_scores_overflow_nothing():
    q, k, v, d_out = problem(1, 1, 1, 70, 70, 16)
    given = (100 * q, 100 * k, v, d_out)  # the softmax is one-hot, the gradients of q and k zero
    out, dq, dk, dv = results(flash, *given, causal=True)
    true = truth(*given, causal=True)
    assert relative(out, true[0]) < 1e-5
    # The weights are made again from lse, whose last bit in float32 is as much of a weight.
    last_bit = float((q.double() @ k.double().mT).abs().max()) * 1e4 / 4 * 2**-23
    assert relative(dv, true[3]) < 1e-5 + last_bit
    assert max(dq.abs().max(), dk.abs().max()) < 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter tells of NaN
@pytest.mark.parametrize("Tq", [256, 250])
def test_tiles_above_the_diagonal_are_never_visited(Tq):
    q, k, v, d_out = problem(1, 1, 1, Tq, 512, 32)
    expected = results(flash, q, k, v, d_out, causal=True)
    half = 128  # on a border of tiles of every size
    unseen = [x.clone() for x in (k, v)]
    for x in unseen:
        x[:, :, half:] = torch.nan
    out, dq, *_ = results(flash, q, *unseen, d_out, causal=True)
    assert torch.equal(out[:, :, :half], expected[0][:, :, :half])
    assert torch.equal(dq[:, :, :half], expected[1][:, :, :half])
    assert out[:, :, half:].isnan().any()
    early = [x.clone() for x in (q, d_out)]
    for x in early:
        x[:, :, :half] = torch.nan
    _, _, dk, dv = results(flash, early[0], k, v, early[1], causal=True)
    assert torch.equal(dk[:, :, half:], expected[2][:, :, half:])
    assert torch.equal(dv[:, :, half:], expected[3][:, :, half:])
    beyond = [x.clone() for x in (k, v)]  # keys that no query reaches, its last tile included
    for x in beyond:
        x[:, :, 256:] = torch.nan
    assert torch.equal(flash(q, *beyond, causal=True), expected[0])


def test_a_tile_that_sticks_out_over_the_queries_reads_no_key_beyond_them(monkeypatch):
    monkeypatch.setattr(flash_plans, "PROCESSORS", 1)  # tiles of 64 queries × 32 keys
    q, k, v, _ = problem(1, 1, 1, 20, 64, 32)
    expected = flash(q, k, v, causal=True)
    k[:, :, 32:], v[:, :, 32:] = torch.nan, torch.nan
    assert torch.equal(flash(q, k, v, causal=True), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("Tq", "Tk"), [(200, 90), (90, 200), (129, 129)])
def test_the_tiles_of_a_full_gpu_match_float64_too(monkeypatch, Tq, Tk, causal):
    monkeypatch.setattr(flash_plans, "PROCESSORS", 1)  # as if there were programs for all
    for dtype, D in ((torch.float32, 32), (torch.float16, 32), (torch.float16, 72)):
        assert flash_plans.chosen((1, 1, Tq, D), dtype, listed=False).forward.M >= 64
        check(flash, problem(1, 1, 1, Tq, Tk, D, dtype), causal=causal)


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    asked, whole = [], kernels._gradients
    monkeypatch.setattr(
        kernels, "_gradients", lambda made, *a, **o: asked.append(len(made)) or whole(made, *a, **o)
    )
    q, k, v, d_out = problem(1, 1, 1, 40, 40, 16)
    for wanted, launches in (((q,), [1]), ((k,), [2]), ((v,), [2]), ((q, v), [2, 1])):
        asked.clear()
        inputs = [x.detach().requires_grad_(any(x is w for w in wanted)) for x in (q, k, v)]
        flash(*inputs).backward(d_out)
        assert asked == launches
        assert [x.grad is not None for x in inputs] == [x.requires_grad for x in inputs]


@pytest.mark.gpus(2)
def test_kernels_run_on_the_device_of_their_tensors():
    given = problem(1, 2, 2, 130, 130, 64, torch.float16)
    elsewhere = [x.to("cuda:1") for x in given]
    torch.cuda.set_device(0)
    for own, other in zip(results(flash, *given), results(flash, *elsewhere), strict=True):
        assert other.device.index == 1
        assert torch.equal(own.cpu(), other.cpu())


def test_what_cannot_be_computed_is_refused_with_the_value_and_the_fix():
    q, k, v, _ = problem(1, 1, 1, 8, 8, 16)
    for scale in (0.0, -1.0, float("nan"), 1e-60, 1e39):
        with pytest.raises(ValueError, match=r"scale = .*(positive|finite)"):
            flash(q, k, v, scale=scale)
    with pytest.raises(ValueError, match=r"D = 20.*multiples of 8.*pad"):
        flash(*(torch.nn.functional.pad(x, (0, 4)) for x in (q, k, v)))
    with pytest.raises(ValueError, match="float64"):
        flash(*(x.double() for x in (q, k, v)))
    from blockshock.attention import patterns

    with pytest.raises(ValueError, match="block_sparse"):
        flash(q, k, v, pattern=patterns.band(4))
    assert "D = 300" in unsupported(
        "flash_triton", (1, 1, 8, 300), (1, 1, 8, 300), torch.float16, "cuda"
    )


def test_a_second_derivative_is_refused():
    q, k, v, _ = problem(1, 1, 1, 8, 8, 16)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(flash(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dq.sum().backward()


@pytest.mark.gpus(1)
def test_long_attention_needs_memory_linear_in_its_length():
    peaks = []
    for T in (65536, 131072):
        q, k, v = (torch.randn(1, 1, T, 128, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
        inputs = [x.requires_grad_() for x in (q, k, v)]
        torch.cuda.reset_peak_memory_stats()
        flash(*inputs, causal=True).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() / q.nbytes)
        del q, k, v, inputs
    assert peaks[1] <= 12
    assert peaks[1] <= 1.05 * peaks[0]
