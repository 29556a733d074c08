"""The reference is softmax(scale · Q Kᵀ) V by its definition, for every mask and grouping."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blockshock.attention import METHODS, patterns, shapes, unsupported, work
from blockshock.attention.reference import attended, log_sum_exp, reference


def inputs(batch=2, heads=2, kv_heads=2, Tq=5, Tk=5, D=4, dtype=torch.float64, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(heads, Tq), (kv_heads, Tk), (kv_heads, Tk)]
    drawn = [torch.randn(batch, *size, D, generator=generator, dtype=dtype) for size in sizes]
    return [x.requires_grad_(grad) for x in drawn]


def by_hand(q, k, v, sees, scale):
    """out and lse, entry by entry in Python's floats; sees(b, h, i, j) is the mask."""
    out, lse = torch.zeros_like(q), torch.full(q.shape[:-1], -math.inf, dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        key, value = k[b, h // group].tolist(), v[b, h // group].tolist()
        row = q[b, h, i].tolist()
        weight = {
            j: math.exp(scale * sum(map(float.__mul__, row, key[j])))
            for j in range(len(key))
            if sees(b, h, i, j)
        }
        if weight:
            total = sum(weight.values())
            lse[b, h, i] = math.log(total)
            mixed = [sum(weight[j] * value[j][d] for j in weight) / total for d in range(len(row))]
            out[b, h, i] = torch.tensor(mixed, dtype=q.dtype)
    return out, lse


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(5, 5), (3, 7), (7, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_it_is_the_softmax_worked_out_by_hand(kv_heads, sizes, causal, scale):
    q, k, v = inputs(heads=4, kv_heads=kv_heads, Tq=sizes[0], Tk=sizes[1])
    out, lse = by_hand(q, k, v, lambda b, h, i, j: j <= i or not causal, scale or 0.5)
    torch.testing.assert_close(reference(q, k, v, causal=causal, scale=scale), out)
    torch.testing.assert_close(log_sum_exp(q, k, causal=causal, scale=scale), lse)


def test_each_batch_and_head_has_the_mask_of_its_own():
    mask = torch.rand(2, 4, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[1, 2, 3] = False
    q, k, v = inputs(heads=4, kv_heads=2, Tk=6)
    out, lse = by_hand(q, k, v, lambda *at: mask[at] and at[3] <= at[2], 0.5)
    pattern = patterns.from_mask(mask)
    torch.testing.assert_close(reference(q, k, v, causal=True, pattern=pattern), out)
    torch.testing.assert_close(log_sum_exp(q, k, causal=True, pattern=pattern), lse)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_rows_that_see_nothing_are_zero_with_zero_gradients():
    pattern = patterns.predicate(lambda b, h, i, j: (i % 2 == 0) & (j > 0), "even rows, not key 0")
    q, k, v = inputs(grad=True)
    with torch.autograd.detect_anomaly():  # no NaN on the way, either
        out = reference(q, k, v, pattern=pattern)
        out.sum().backward()
    assert (out[:, :, 1::2] == 0).all()
    assert (out[:, :, ::2] != 0).all()
    assert (q.grad[:, :, 1::2] == 0).all()
    assert (k.grad[:, :, 0] == 0).all()
    assert (v.grad[:, :, 0] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (log_sum_exp(q, k, pattern=pattern)[:, :, 1::2] == -torch.inf).all()


def test_second_derivatives_are_right_where_rows_see_nothing():
    pattern = patterns.predicate(lambda b, h, i, j: (i % 2 == 0) & (j > 0), "even rows, not key 0")
    tensors = inputs(1, 2, 1, 3, 3, 2, grad=True)
    assert torch.autograd.gradgradcheck(lambda *x: reference(*x, pattern=pattern), tensors)


@pytest.mark.parametrize(("Tq", "Tk"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_empty_sequences(Tq, Tk, causal):
    q, k, v = inputs(Tq=Tq, Tk=Tk, grad=True)
    out = reference(q, k, v, causal=causal)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(q))
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (q, k, v))
    assert (log_sum_exp(q, k, causal=causal) == -torch.inf).all()


@pytest.mark.parametrize("causal", [False, True])
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    Tq=st.integers(1, 9),
    Tk=st.integers(1, 9),
    D=st.integers(1, 8),
)
@settings(max_examples=25, deadline=None)
def test_it_agrees_with_torch_in_alignment_grouping_and_gradients(
    causal, batch, kv_heads, group, Tq, Tk, D
):
    sizes = (batch, kv_heads * group, kv_heads, Tq, Tk, D)
    ours, theirs = inputs(*sizes, grad=True), inputs(*sizes, grad=True)
    out = reference(*ours, causal=causal)
    expected = F.scaled_dot_product_attention(*theirs, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    weight = torch.randn(out.shape, dtype=out.dtype)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for own, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, their.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once(dtype):
    q, k, v = inputs(Tq=9, Tk=9, dtype=dtype)
    exact = reference(q.double(), k.double(), v.double())
    out = reference(q, k, v)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference(q, k, v), out)


def test_bad_inputs_are_named_with_the_rule_and_the_fix():
    q, k, v = inputs(heads=4, kv_heads=2)
    for wrong, told in [
        ((q[0], k, v), r"\(4, 5, 4\).*\[batch, heads, Tq, D\]"),
        ((q, k, v[:, :, 1:]), "one value"),
        ((q[:1], k, v), "1 batches"),
        ((q[..., :3], k, v), "D = 3 in q and 4"),
        ((q[:, :3], k, v), "3 heads .* multiple of 2"),
        ((q, k.float(), v), "one is needed"),
        ((q.int(), k.int(), v.int()), "dtype int32"),
    ]:
        with pytest.raises(ValueError, match=told):
            reference(*wrong)
    with pytest.raises(ValueError, match="Tq 5"):
        reference(q, k, v, pattern=patterns.documents([2, 2]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        None,
        patterns.band(2),
        patterns.random_blocks(3, 0.4),
        patterns.random_blocks(3, 0.4, per_head=True),
        patterns.both(patterns.band(2), patterns.random_blocks(3, 0.4, per_head=True)),
    ],
    ids=lambda pattern: pattern.name if pattern else "none",
)
@pytest.mark.parametrize(("Tq", "Tk"), [(63, 100), (100, 63), (1, 5), (0, 4)])
def test_pairs_are_the_entries_of_the_mask(Tq, Tk, pattern, causal):
    shape = shapes.Shape(batch=2, heads=3, kv_heads=3, Tq=Tq, Tk=Tk, D=8)
    seen = attended(shape, causal=causal, pattern=pattern, device="cpu").expand(2, 3, Tq, Tk)
    assert work.pairs(pattern, causal, Tq, Tk, 2, 3) == int(seen.sum())


def test_operations_are_counted_as_flash_attention_does():
    assert work.flops("forward", 100, 64) == 4 * 100 * 64
    assert work.flops("backward", 100, 64) == 10 * 100 * 64
    assert work.flops("both", 100, 64) == 14 * 100 * 64
    with pytest.raises(ValueError, match="unknown phase 'training'"):
        work.flops("training", 1, 1)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", 1j, 10**400, torch.tensor(1.0)])
def test_a_scale_that_is_no_finite_number_is_refused_by_all(scale):
    q = torch.zeros(1, 1, 8, 16)
    for name, method in METHODS.items():
        if unsupported(name, q.shape, q.shape, q.dtype, "cpu") is None:
            with pytest.raises(ValueError, match="a finite number"):
                method(q, q, q, scale=scale)
            told = unsupported(name, q.shape, q.shape, q.dtype, "cpu", scale=scale)
            assert "a finite number" in told
    with pytest.raises(ValueError, match="a finite number"):
        log_sum_exp(q, q, scale=scale)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_tensor_is_named(name):
    q = torch.zeros(1, 1, 8, 16)
    for wrong, message in (((q.tolist(), q, q), "q is a list"), ((q, q, None), "v is a NoneType")):
        with pytest.raises(ValueError, match=message):
            METHODS[name](*wrong)
