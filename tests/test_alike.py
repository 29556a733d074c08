"""Ranks that differ: in the model, in the call, in what a layer is given."""

import pytest
import torch
from torch import nn

import blockshock
from blockshock.linear import METHODS
from blockshock.linear.alike import digest
from tests import alike_jobs as jobs

SPLIT = [name for name in METHODS if name != "dense_single"]


@pytest.mark.parametrize("kind", jobs.OTHER_MODELS)
def test_another_model_on_one_rank_is_the_same_error_on_all(ranks, kind):
    answers = ranks.run(jobs.other_model, kind)
    (text,) = {text for text, _ in answers}
    assert text.startswith("ValueError: convert changes nothing")
    assert ("layer '3'" if kind == "one more" else "layer '2'") in text
    assert all(unchanged for _, unchanged in answers)


@pytest.mark.parametrize("kind", ["weight", "swapped rows", "bias"])
def test_other_values_are_named_with_what_to_do(ranks, kind):
    for text, _ in ranks.run(jobs.other_model, kind):
        assert f"bits of {'bias' if kind == 'bias' else 'weight'}" in text
        assert "broadcast the model" in text


@pytest.mark.parametrize("kind", jobs.OTHER_CALLS)
def test_another_call_on_one_rank_is_an_error_on_all(ranks, kind):
    for text, unchanged in ranks.run(jobs.other_call, kind):
        assert unchanged
        assert text.startswith(("ValueError", "ZeroDivisionError"))
        assert jobs.SAID.get(kind, kind) in text


def test_another_method_on_one_rank_is_an_error_on_all(ranks):
    assert all("method: rank 0 has dense_tp_row" in text for text in ranks.run(jobs.other_method))


def test_a_rank_that_cannot_build_its_layers_leaves_all_models_as_they_were(ranks):
    answers = ranks.run(jobs.cannot_build)
    assert all(unchanged for _, unchanged in answers)
    assert answers[-1][0] == "OutOfMemoryError: no memory"
    for text, _ in answers[:-1]:
        assert text == (
            f"ValueError: convert changes nothing, for rank {ranks.size - 1} has "
            "OutOfMemoryError: no memory"
        )


def test_a_rank_that_does_not_come_is_an_error(ranks):
    text, *_ = ranks.run(jobs.does_not_come)
    assert text.startswith("RuntimeError: convert is a step of all")


@pytest.mark.parametrize("kind", ["hook", "lost layer"])
def test_ranks_that_revert_other_models_are_refused(ranks, kind):
    for text, unchanged in ranks.run(jobs.reverted_otherwise, kind):
        assert unchanged
        assert text.startswith("ValueError: ")
        assert "layer '0'" in text


def test_a_group_that_this_rank_is_not_in_is_refused(ranks):
    first, *others = ranks.run(jobs.not_in_the_group)
    assert first is None
    assert all("not in the process group" in text for text in others)


def test_a_wrapper_made_before_is_a_warning(ranks):
    for told in ranks.run(jobs.wrapped_before):
        (text,) = told
        assert "make it after convert" in text


DIFFERENT = {
    "data": "x of layer '0'",
    "one row": "row 5",
    "rows": "[7, 128]",
    "nan on one": "row 3",
    "dropout": "x of layer '2'",
    "loss": "dY of layer '2'",
    "other layer": "x of layer",
}


# All kinds with one method, and x and dY with each: what is compared does not depend on the method.
@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *[("block_shock", kind) for kind in DIFFERENT],
        *[(name, kind) for name in SPLIT if name != "block_shock" for kind in ("data", "loss")],
    ],
)
def test_what_is_not_replicated_is_an_error_in_the_first_step(ranks, method, kind):
    answers = ranks.run(jobs.inputs, method, kind, dropout=0.1 if kind == "dropout" else 0.0)
    assert len(set(answers)) == 1
    assert answers[0].startswith("ValueError: ")
    assert DIFFERENT[kind] in answers[0]


@pytest.mark.parametrize("kind", ["", "nan", "rounding"])
def test_what_is_replicated_but_for_rounding_is_no_error(ranks, kind):
    assert ranks.run(jobs.inputs, "dense_tp_row", kind) == [None] * ranks.size


def test_later_calls_are_compared_as_asked(ranks):
    for every, errors in ((None, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])):
        for answers in ranks.run(jobs.calls, every, "data", 7):
            assert [call for call, text in enumerate(answers) if text] == errors


def test_the_first_step_of_training_is_compared_after_an_evaluation(ranks):
    for evaluated, trained in ranks.run(jobs.in_training_after_eval):
        assert evaluated is None
        assert "x of layer '2'" in trained


def test_a_recomputed_forward_is_compared_like_any_other(ranks):
    assert all(ranks.run(jobs.recomputed))


def test_comparing_every_call_is_refused_in_a_capture(ranks):
    if ranks.device != "cuda":
        pytest.skip("CUDA graphs need GPUs")
    assert ranks.run(jobs.captured, None) == [None] * ranks.size
    assert all("replay cannot do" in text for text in ranks.run(jobs.captured, 2))


def test_checks_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="no layer that several ranks hold"):
        blockshock.check_inputs(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="every = 0"):
        blockshock.check_inputs(nn.Linear(64, 64), every=0)


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        *[(method, "bfloat16", {}) for method in SPLIT],
        ("block_shock", "float16", {"master": "float32"}),
        ("block_shock", "bfloat16", {"master": "float32"}),
        ("block_shock", "bfloat16", {"master": "dense"}),
        ("dense_tp_row", "float16", {}),
        ("dense_tp_row", "float64", {}),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value,
)
def test_dtype_flags_and_values_come_back(ranks, method, kind, options):
    assert ranks.run(jobs.there_and_back, method, kind, options) == [
        (True, ["0.bias"])
    ] * ranks.size  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_a_digest_sees_every_bit_and_its_place(dtype):
    torch.manual_seed(0)
    x = (100 * torch.randn(33, 9)).to(dtype)
    other = {
        "negative": -x,
        "two signs": torch.cat([-x[:2], x[2:]]),
        "rows": x.flip(0),
        "columns": x.flip(1),
        "shape": torch.cat([x, torch.zeros_like(x[:1])]),
        "one": x + torch.eye(33, 9).to(dtype),
    }
    found = {digest(value) for value in other.values()} | {digest(x)}
    assert len(found) == 1 + len(other)


def test_a_digest_is_of_the_values_however_they_lie():
    x = torch.randn(7, 5).bfloat16()
    x[3, 2] = float("nan")
    apart = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(7, 5)  # at an odd place
    assert digest(x) == digest(apart) == digest(x.t().contiguous().t())
    assert digest(x[:0]) == 0


def test_a_digest_sees_the_order_of_large_pieces():
    x = torch.arange(2**21 + 3, dtype=torch.float64)
    other = torch.cat([x[2**20 : 2**21], x[: 2**20], x[2**21 :]])
    assert digest(x) != digest(other)
