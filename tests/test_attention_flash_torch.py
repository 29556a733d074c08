"""Tile by tile gives what whole matrices give, in the output, the gradients and what is saved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockshock.attention import flash_torch as module
from blockshock.attention import patterns
from blockshock.attention.flash_torch import FlashAttentionTorch, flash_torch
from blockshock.attention.reference import log_sum_exp, reference


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "TILE", 4)


@pytest.fixture
def poisoned():
    """New memory is NaN until it is written."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def inputs(batch=2, heads=2, kv_heads=2, Tq=9, Tk=9, D=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(heads, Tq), (kv_heads, Tk), (kv_heads, Tk), (heads, Tq)]
    drawn = [torch.randn(batch, *size, D, generator=generator, dtype=dtype) for size in sizes]
    return [x.requires_grad_() for x in drawn[:3]], drawn[3]


def run(method, tensors, d_out, **options):
    """out and the three gradients."""
    copies = [x.detach().clone().requires_grad_() for x in tensors]
    out = method(*copies, **options)
    out.backward(d_out)
    return [out.detach(), *(x.grad for x in copies)]


def assert_equal_results(tensors, d_out, **options):
    ours, truth = (run(method, tensors, d_out, **options) for method in (flash_torch, reference))
    for own, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(own, true, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2)])
@pytest.mark.parametrize(("Tq", "Tk"), [(6, 6), (3, 7), (7, 3)])
@pytest.mark.usefixtures("small_tiles", "poisoned")
def test_gradients_are_the_derivatives(Tq, Tk, heads, kv_heads, causal):
    tensors, _ = inputs(1, heads, kv_heads, Tq, Tk, D=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: FlashAttentionTorch.apply(q, k, v, causal, 0.7), tensors
    )


@given(
    batch=st.integers(0, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    Tq=st.integers(0, 20),
    Tk=st.integers(0, 20),
    D=st.sampled_from([1, 5, 16]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3, 2.0, 0.0, -1.0]),
    tile=st.sampled_from([1, 3, 4, 8, 64]),
)
@settings(max_examples=80, deadline=None)
def test_output_and_gradients_match_the_reference(
    batch, kv_heads, group, Tq, Tk, D, causal, scale, tile
):
    tensors, d_out = inputs(batch, kv_heads * group, kv_heads, Tq, Tk, D)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE", tile)
        assert_equal_results(tensors, d_out, causal=causal, scale=scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("Tq", "Tk"), [(300, 300), (129, 257), (1000, 63), (1, 128)])
def test_the_usual_tiles_match_the_reference(Tq, Tk, causal):
    tensors, d_out = inputs(1, 2, 1, Tq, Tk, 16)
    assert_equal_results(tensors, d_out, causal=causal)


@pytest.mark.usefixtures("small_tiles", "poisoned")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("Tq", "Tk"), [(0, 5), (5, 0), (0, 0), (9, 5), (5, 9)])
def test_no_unwritten_memory_is_read(Tq, Tk, causal):
    tensors, d_out = inputs(2, 4, 2, Tq, Tk)
    assert_equal_results(tensors, d_out, causal=causal)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("Tq", "Tk"), [(9, 9), (5, 11), (6, 0)])
@pytest.mark.parametrize("leading", [(2,), (2, 4)], ids=["one head", "heads"])
def test_only_the_log_sum_exp_is_saved_beside_inputs_and_output(leading, Tq, Tk, causal):
    tensors, d_out = inputs(2, 4, 2, Tq, Tk)
    q, k, v, d_out = [x[:, 0] if len(leading) == 1 else x for x in (*tensors, d_out)]
    out = FlashAttentionTorch.apply(q, k, v, causal)
    saved = list(out.grad_fn.saved_tensors)
    small = [x for x in saved if x.shape == (*leading, Tq)]
    assert len(small) == 1
    assert len(saved) == 5
    known = {x.data_ptr() for x in (q, k, v, out)}
    assert {x.data_ptr() for x in saved if x is not small[0]} <= known
    whole = (q, k) if q.dim() == 4 else (q[:, None], k[:, None])
    expected = log_sum_exp(*whole, causal=causal).view(small[0].shape)
    torch.testing.assert_close(small[0], expected.detach())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("causal", [False, True])
def test_one_head_may_leave_out_its_dimension(causal):
    tensors, d_out = inputs(3, 1, 1, 9, 7)
    flat = [x.detach()[:, 0].clone().requires_grad_() for x in tensors]
    out = FlashAttentionTorch.apply(*flat, causal)
    out.backward(d_out[:, 0])
    truth = run(reference, tensors, d_out, causal=causal)
    for own, true in zip([out, *(x.grad for x in flat)], truth, strict=True):
        torch.testing.assert_close(own, true[:, 0], atol=2e-5, rtol=2e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_summed_in_float32(dtype):
    tensors, d_out = inputs(2, 4, 2, 33, 29, dtype=dtype)
    ours = run(flash_torch, tensors, d_out, causal=True)
    exact = run(reference, [x.double() for x in tensors], d_out.double(), causal=True)
    for own, true in zip(ours, exact, strict=True):
        assert own.dtype == dtype
        # The gradients also feel that out was rounded before delta was made of it.
        assert (own.double() - true).norm() <= torch.finfo(dtype).eps * true.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flash_torch(*tensors, causal=True), ours[0])


@pytest.mark.usefixtures("small_tiles")
def test_inputs_may_be_views_of_any_strides():
    heads_last = [torch.randn(2, 9, 8, 4).permute(0, 3, 1, 2) for _ in range(3)]  # [2, 4, 9, 8]
    d_out = torch.randn(2, 1, 9, 1).expand(2, 4, 9, 8)
    q, k, v = heads_last[0], heads_last[1][:, ::2], heads_last[2].flip(2)[:, :2]
    assert_equal_results([q, k, v], d_out, causal=True)
    out = flash_torch(q, k, v)
    torch.testing.assert_close(out, reference(q, k, v))


@pytest.mark.usefixtures("small_tiles")
def test_a_gradient_that_nobody_asks_for_is_not_needed():
    (q, k, v), d_out = inputs()
    out = flash_torch(q.detach(), k, v.detach())
    out.backward(d_out)
    torch.testing.assert_close(k.grad, run(reference, (q, k, v), d_out)[2], atol=2e-5, rtol=2e-5)


def test_a_second_derivative_is_refused():
    (q, k, v), d_out = inputs()
    for weight in (torch.ones_like(d_out), d_out.requires_grad_()):
        out = flash_torch(q, k, v)
        first = torch.autograd.grad(out, (q, k, v), weight, create_graph=True)
        for own, true in zip(first, run(reference, (q, k, v), weight)[1:], strict=True):
            torch.testing.assert_close(own, true, atol=2e-5, rtol=2e-5)
        for gradient in first:
            with pytest.raises(RuntimeError, match=r"no second derivative.*use the method ref"):
                (out.sum() + gradient.square().sum()).backward(retain_graph=True)


def test_a_pattern_is_refused_with_the_method_that_takes_it():
    (q, k, v), _ = inputs()
    with pytest.raises(ValueError, match=r"band\(2\).*use block_sparse"):
        flash_torch(q, k, v, pattern=patterns.band(2))
    with pytest.raises(ValueError, match="multiple of 2"):
        FlashAttentionTorch.apply(q[:, :1], k, v)
