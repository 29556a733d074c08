"""What trainers do to converted models: norms, scalers, optimizers, wrappers, dense writes."""

import inspect

import pytest
import torch

from blockshock.distributed import open_ranks
from tests import trainer_jobs as jobs
from tests import wrapper_jobs as wrapped

LAYERS = [
    ("block_shock", {"mask": "tile"}),
    ("block_shock", {"mask": "1100"}),
    ("block_shock", {"mask": "tile", "master": "float32"}),
    ("block_shock", {"mask": "magnitude", "master": "dense"}),
    ("block_shock_folded", {}),
    ("masked_split", {"mask": "tile_magnitude"}),
    ("dense_tp_row", {}),
    ("dense_tp_column", {}),
]
EACH = pytest.mark.parametrize(
    ("method", "options"), LAYERS, ids=["-".join([m, *o.values()]) for m, o in LAYERS]
)
# Wrappers ask whether a parameter is a part, which parts are alike, and their dtypes: a layer for
# each answer, and both ways of splitting.
WRAPPED = pytest.mark.parametrize(
    ("method", "options"),
    [
        ("block_shock", {"mask": "tile", "master": "float32"}),
        ("block_shock", {"mask": "magnitude", "master": "dense"}),
        ("masked_split", {"mask": "tile_magnitude"}),
        ("dense_tp_column", {}),
    ],
    ids=str,
)
# What PyTorch's optimizers are to a part of a weight.
EXACT = {
    "ASGD": {}, "Adadelta": {}, "Adagrad": {}, "Adam": {"weight_decay": 0.1}, "AdamW": {},
    "Adamax": {}, "NAdam": {}, "RAdam": {}, "RMSprop": {"centered": True}, "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}  # fmt: skip
WHOLE = ["Adafactor", "LBFGS", "Muon"]
SPARSE = ["SparseAdam"]  # takes no gradient of a linear layer


def limit(ranks) -> float:
    """In bf16, on GPUs, a LayerNorm's gradients are off by 0.02; float64 elsewhere."""
    return 0.1 if ranks.device == "cuda" else 1e-10


@pytest.fixture(scope="module")
def four(ranks):
    """Four ranks: the session's, or CPU ranks beside them."""
    if ranks.size == 4:
        yield ranks
    elif ranks.device == "cuda":
        pytest.skip("two dimensions need four GPUs and --ranks 4")
    else:
        with open_ranks(4, "cpu") as pool:
            yield pool


# Every layer with the usual norm; the other orders, which know no layers, with two of them.
@pytest.mark.parametrize(
    ("method", "options", "order", "foreach"),
    [
        *[(*layer, 2.0, None) for layer in LAYERS],
        *[
            (*layer, *how)
            for layer in (LAYERS[2], LAYERS[-1])
            for how in [(2.0, True), (1.0, False), (float("inf"), True), (3.0, None)]
        ],
    ],
    ids=str,
)
def test_the_clipped_norm_is_the_dense_models(ranks, method, options, order, foreach):
    for (dense, own), error, same in ranks.run(jobs.clipped, method, options, order, foreach):
        assert own == pytest.approx(dense, rel=limit(ranks))
        assert error < limit(ranks)
        assert same


@EACH
def test_norms_in_hooks_and_of_autograd_grad_are_the_dense_models(ranks, method, options):
    for dense, own in ranks.run(jobs.normed_elsewhere, method, options):
        assert own == pytest.approx(dense, rel=limit(ranks))


@EACH
def test_clipped_steps_are_the_dense_models_and_leave_no_rank_behind(ranks, method, options):
    for far, same in ranks.run(jobs.trained, method, options):
        assert max(far.values()) < limit(ranks), far
        assert same


@pytest.mark.parametrize("order", [2.0, float("inf")])
def test_the_norm_of_layers_of_several_groups_counts_each_part_once(ranks, order):
    for (dense, own), empty in ranks.run(jobs.of_two_groups, order):
        assert own == pytest.approx(dense, rel=limit(ranks))
        assert empty == 0


@EACH
def test_an_infinity_on_one_rank_is_the_norm_and_the_error_of_all(ranks, method, options):
    for norm, raised in ranks.run(jobs.not_finite, method, options):
        assert norm == float("inf")
        assert "non-finite" in raised


def test_a_copy_of_a_gradient_has_the_whole_norm_and_others_are_refused(ranks):
    for far, refused in ranks.run(jobs.norm_of_a_copy):
        assert max(far.values()) < limit(ranks), far
        assert all("rank" in text or "order" in text for text in refused.values()), refused


@EACH
def test_a_weight_stays_a_part_whatever_replaces_it(ranks, method, options):
    for known in ranks.run(jobs.still_parts, method, options):
        assert all(known.values()), known


@pytest.mark.parametrize("fused", [False, True])
@EACH
def test_an_overflow_on_one_rank_makes_all_ranks_skip_the_step(ranks, method, options, fused):
    answers = ranks.run(jobs.scaled, method, options, fused)
    if None in answers:
        pytest.skip("PyTorch's scaler takes no bf16 gradients on GPUs")
    for (first, low), (second, scale) in answers:
        assert not any(first)
        assert low == scale == 2.0**9
        assert all(second)


def test_every_optimizer_of_pytorch_is_in_one_list():
    classes = inspect.getmembers(torch.optim, inspect.isclass)
    names = {n for n, c in classes if issubclass(c, torch.optim.Optimizer)} - {"Optimizer"}
    assert {*EXACT, *WHOLE, *SPARSE} == names


@pytest.mark.parametrize("name", EXACT)
def test_an_elementwise_optimizer_steps_a_part_as_the_dense_weight(ranks, name):
    for far in ranks.run(jobs.stepped, name, LAYERS, EXACT[name]):
        assert max(far.values()) < 4, far


@pytest.mark.parametrize("name", WHOLE)
def test_an_optimizer_that_needs_all_of_a_weight_is_refused(ranks, name):
    for said in ranks.run(jobs.refused_step, name, LAYERS):
        for text, untouched in said.values():
            assert name in text
            assert "elementwise optimizer" in text
            assert untouched


def test_an_optimizer_that_sends_parameters_is_refused_the_parts(ranks):
    for (text, untouched), (rest, _) in ranks.run(jobs.zero_redundancy):
        assert "ZeroRedundancyOptimizer over the ranks" in text
        assert untouched
        assert rest is None


@pytest.mark.parametrize(
    "ddp",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"gradient_as_bucket_view": True, "static_graph": True},
    ],
    ids=["plain", "views"],
)
@EACH
def test_ddp_over_a_layers_ranks_leaves_the_parts_alone(ranks, method, options, ddp):
    for far in ranks.run(wrapped.in_ddp, method, options, **ddp):
        assert max(far.values()) < limit(ranks), far


@WRAPPED
def test_ddp_that_was_not_told_is_refused_before_it_sends_anything(ranks, method, options):
    for text, untouched, after, ignored in ranks.run(wrapped.not_asked_to_ignore, method, options):
        assert "blockshock.ignore_in_ddp(model)" in text
        assert untouched
        assert after is None
        assert ignored == []


@WRAPPED
def test_ddp_beside_the_layers_ranks_averages_the_parts(four, method, options):
    for far in four.run(wrapped.in_two_dimensions, method, options):
        assert max(far.values()) < limit(four), far


# What refuses asks for the part alone, and of masks where there are some.
@pytest.mark.parametrize(
    ("method", "options"),
    [("block_shock", {"mask": "magnitude", "master": "dense"}), ("dense_tp_column", {})],
    ids=str,
)
def test_ddp_over_other_ranks_is_refused(four, method, options):
    for said in four.run(wrapped.wrong_in_two_dimensions, method, options):
        right = {name for name, text in said.items() if text is None}
        assert right == {"right", "right, ignored"}, said
        assert all("process_group=" in said[n] for n in ("all ranks", "all ranks, ignored"))
        assert "would not be averaged" in said["replicas, ignored"]
        assert "ignore_in_ddp" in said["own ranks"]
        for name in said.keys() & {"other parts", "other masks"}:
            assert "another part" in said[name]


@WRAPPED
def test_fully_shard_is_refused_a_part_and_trains_the_rest(ranks, method, options):
    for text, far in ranks.run(wrapped.fully_sharded, method, options):
        assert "ignored_params" in text
        assert max(far.values()) < limit(ranks), far


@pytest.mark.parametrize("use_orig_params", [False, True])
@WRAPPED
def test_fully_sharded_data_parallel_is_refused_a_part(ranks, method, options, use_orig_params):
    for text in ranks.run(wrapped.sharded_flat, method, options, use_orig_params):
        mixed = "float32" in options.values() and ranks.device == "cuda"  # its dtypes come first
        assert ("uniform dtype" if mixed else "ignored_states") in text


@WRAPPED
def test_fully_shard_over_replicas_is_refused(four, method, options):
    for text, ignored in four.run(wrapped.sharded_over_replicas, method, options):
        assert "over ranks that hold the same part use DistributedDataParallel" in text
        assert "average the bias" in ignored


@EACH
def test_a_dense_state_is_refused_also_where_it_is_not_strict(ranks, method, options):
    for text, untouched in ranks.run(jobs.dense_state, method, options):
        assert "which part of the weight" in text
        assert untouched


@pytest.mark.parametrize("mask", ["tile", "1100", "magnitude"])
def test_what_is_written_off_the_mask_is_the_other_terms(ranks, mask):
    for errors in ranks.run(jobs.written_off_the_mask, {"mask": mask}):
        assert max(errors) < limit(ranks)
