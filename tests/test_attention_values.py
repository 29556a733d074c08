"""Values at the edges: what nobody sees, scores of −inf, autocast, causal from the last key.

Every method is compared with plain float64, forward and, where it has one, backward.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

from blockshock.attention import METHODS, patterns, peers, reads, shapes, unsupported, work
from tests.attention_checks import (
    DEVICE,
    NAMES,
    check_plain,
    plain,
    problem,
    relative,
    results,
)

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
T = 40
ROW, COLUMN = torch.arange(T, device=DEVICE)[:, None], torch.arange(T, device=DEVICE)
EVERY = ("reference", "flex", "flash_torch", "flash_triton", "block_sparse")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("Tq", "Tk"), [(1, 90), (7, 90), (40, 150), (90, 90), (150, 40), (40, 1)])
def test_bottom_right_counts_queries_and_keys_from_their_last(name, Tq, Tk):
    seen = torch.arange(Tk, device=DEVICE) <= torch.arange(Tq, device=DEVICE)[:, None] + Tk - Tq
    check_plain(name, problem(2, 2, 1, Tq, Tk, 16), seen, causal="bottom_right")
    count = work.pairs(None, "bottom_right", Tq, Tk, 2, 2)
    assert count == 4 * int(seen.sum())


@pytest.mark.parametrize("name", METHODS)
def test_other_words_for_causal_are_refused(name):
    given = problem(1, 1, 1, 9, 9, 16)[:3]
    for wrong in ("top_left", "true", None, 2):
        with pytest.raises(ValueError, match=r"causal = .*bottom_right"):
            METHODS["flex" if "sdpa" in name else name](*given, causal=wrong)
    sizes = (1, 1, 9, 16), (1, 1, 12, 16), torch.float16, "cuda"
    assert "'left'" in unsupported(name, *sizes, "left")
    if "sdpa" in name:
        assert "use flash_triton" in unsupported(name, *sizes, "bottom_right")


def dirtied(x, rows):
    """x [..., T, D] with NaN, infinity and a large number in turn in these rows [..., T]."""
    fill = torch.tensor([torch.nan, torch.inf, 60000.0], device=DEVICE)
    fills = fill[torch.arange(x.shape[-2], device=DEVICE) % 3, None].to(x.dtype)
    return torch.where(rows.unsqueeze(-1), fills, x)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter tells of NaN
@pytest.mark.parametrize(
    ("name", "case"),
    [
        *product(
            ("reference", "block_sparse"), ("cache", "per head", "padding", "interval", "causal")
        ),
        *product(("flash_torch", "flash_triton"), ("causal",)),  # they take no pattern
    ],
)
def test_what_nobody_sees_reaches_nothing(name, case):
    Tk = 100
    q, k, v, d_out = problem(2, 4, 2, T, Tk, 16)
    row, column = torch.arange(T, device=DEVICE)[:, None], torch.arange(Tk, device=DEVICE)
    head = torch.arange(4, device=DEVICE).view(-1, 1, 1)
    used = torch.tensor([70, 45], device=DEVICE)
    options, per = {}, {}
    if case == "cache":
        rule, per = (lambda b, h, i, j: j < used[b]), {"per_batch": True}
        seen = column < used.view(-1, 1, 1, 1)
    elif case == "per head":  # one of two heads that share keys sees more
        rule, per = (lambda b, h, i, j: j < 40 + 7 * h), {"per_head": True}
        seen = column < 40 + 7 * head
    elif case == "padding":
        rule = lambda b, h, i, j: (i < 25) & (j < 50)  # noqa: E731
        seen = (row < 25) & (column < 50)
    else:
        seen = (column <= row) & (row - column <= (9 if case == "interval" else Tk))
        options = {"causal": True} if case == "causal" else {"pattern": patterns.causal_band(9)}
    if case not in ("interval", "causal"):
        options = {"pattern": patterns.predicate(rule, **per)}
    seen = seen.expand(2, 4, T, Tk)
    true = results(lambda *x: plain(*x, seen), *(x.double() for x in (q, k, v, d_out)))
    nobody = ~seen.any(2).view(2, 2, 2, Tk).any(2)
    nothing = ~seen.any(3)
    dirty = [dirtied(x, nobody) for x in (k, v)]
    given = dirtied(q, nothing), *dirty, dirtied(d_out, nothing)
    found = results(METHODS[name], *given, **options)
    for what, own, exact in zip(NAMES, found, true, strict=True):
        assert relative(own, exact) < 2e-5, what


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["reference", "flash_torch", "flash_triton", "block_sparse"])
@pytest.mark.parametrize("keys", [slice(0, 64), slice(64, 128), slice(0, 130), slice(0, 140)])
def test_keys_with_scores_of_minus_infinity_have_no_weight(name, keys):
    q, k, v, _ = problem(1, 2, 1, 40, 140, 16)
    q[..., 0] = 1.0
    k[:, :, keys, 0] = -torch.inf
    seen = torch.ones(40, 140, dtype=torch.bool, device=DEVICE)
    seen[:, keys] = False
    true = plain(*(x.double().masked_fill(x == -torch.inf, 0) for x in (q, k, v)), seen)
    assert relative(METHODS[name](q, k, v), true) < 2e-5


@pytest.mark.parametrize("name", ["reference", "flash_torch", "flash_triton", "block_sparse"])
def test_autocast_changes_neither_the_output_nor_any_gradient(name):
    given = problem(1, 2, 1, T, T, 16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):  # the backward as well
        check_plain(name, given, COLUMN <= ROW, causal=True)


def test_second_derivatives_of_the_reference_keep_their_dtype_in_autocast():
    q, k, v, d_out = problem(1, 1, 1, 9, 9, 16)

    def penalty(method, q, k, v, d_out):
        q = q.detach().requires_grad_()
        (dq,) = torch.autograd.grad(method(q, k, v), q, d_out, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), q)[0]

    seen = torch.ones(9, 9, dtype=torch.bool, device=DEVICE)
    true = penalty(lambda *x: plain(*x, seen), *(x.double() for x in (q, k, v, d_out)))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert relative(penalty(METHODS["reference"], q, k, v, d_out), true) < 2e-5


def test_flex_keeps_the_block_masks_used_last_and_none_of_inference_mode():
    pattern = patterns.predicate(lambda b, h, i, j: i >= j)
    shape = shapes.Shape(1, 1, 1, 9, 9, 16)
    with torch.inference_mode():
        first = peers.block_mask(pattern, shape, causal=False, device=DEVICE)
    parts = first.kv_num_blocks, first.kv_indices, first.q_num_blocks, first.q_indices
    assert not any(x.is_inference() for x in parts)
    for n in range(10, 10 + peers.KEPT):
        peers.block_mask(pattern, replace(shape, Tq=n), causal=False, device=DEVICE)
    assert len(reads.kept(pattern)["block masks"]) == peers.KEPT
    assert peers.block_mask(pattern, shape, causal=False, device=DEVICE) is not first
