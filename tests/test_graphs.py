"""Layers in CUDA graphs: a replay multiplies what the weights hold then."""

import pytest

from tests import graph_jobs as jobs

pytestmark = pytest.mark.gpus(2)
LAYERS = [
    ("block_shock", {"mask": "tile"}),
    ("block_shock", {"mask": "1100"}),
    ("block_shock", {"mask": "magnitude"}),
    ("block_shock", {"mask": "tile", "master": "float32"}),
    ("block_shock", {"mask": "1100", "master": "float32"}),
    ("block_shock", {"mask": "magnitude", "master": "float32"}),
    ("block_shock", {"mask": "tile", "master": "dense"}),
    ("block_shock", {"mask": "1100", "master": "dense"}),
    ("block_shock", {"mask": "magnitude", "master": "dense"}),
    ("block_shock_folded", {}),
    ("masked_split", {}),
    ("dense_tp_row", {}),
    ("dense_tp_column", {}),
]
layers = pytest.mark.parametrize(
    ("method", "options"),
    LAYERS,
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value,
)


@layers
def test_a_captured_training_step_replays_the_eager_steps(ranks, method, options):
    for errors in ranks.run(jobs.captured, method, options):
        # The weights move by half of themselves; a stale form or a lost step costs far more.
        assert all(error < 0.02 for error in errors.values()), errors


@layers
def test_graphed_callables_train_as_eager_ones(ranks, method, options):
    for errors in ranks.run(jobs.graphed, method, options):
        assert all(error < 0.02 for error in errors.values()), errors


@layers
def test_a_captured_evaluation_sees_what_was_trained_since(ranks, method, options):
    for same, moved in ranks.run(jobs.evaluation_between_training, method, options):
        assert same < 1e-6
        assert moved > 0.01


@layers
@pytest.mark.parametrize("trained", [True, False])
def test_a_captured_evaluation_sees_values_that_were_loaded(ranks, method, options, trained):
    for error in ranks.run(jobs.loaded_after_a_capture, method, options, trained):
        assert error < 1e-6


@layers
def test_what_a_capture_recorded_is_not_taken_as_done(ranks, method, options):
    for error in ranks.run(jobs.eager_after_a_capture, method, options):
        assert error < 1e-6


def test_an_optimizer_that_would_begin_anew_at_each_replay_is_refused(ranks):
    for said in ranks.run(jobs.captured_too_early, *LAYERS[0]):
        assert "run one whole step before the capture" in said
