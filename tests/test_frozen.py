"""A frozen layer renews nothing in plain use, and multiplies what its weight has become."""

import pytest

from tests import frozen_jobs as jobs
from tests.test_follow import STATED


@pytest.mark.parametrize("options", STATED, ids=lambda o: "-".join(o.values()))
def test_an_average_of_frozen_layers_multiplies_what_it_became(ranks, options):
    assert all(error < 8 for error in ranks.run(jobs.frozen_average, options))


@pytest.mark.parametrize("options", STATED, ids=lambda o: "-".join(o.values()))
def test_a_frozen_layer_is_renewed_once_after_its_memory_was_taken(ranks, options):
    assert ranks.run(jobs.renewals, options) == [[1, 0, 0, 0, 1, 0, 1, 0]] * ranks.size


@pytest.mark.parametrize("kind", jobs.WRITES)
@pytest.mark.parametrize("options", STATED, ids=lambda o: "-".join(o.values()))
def test_a_frozen_layer_follows_writes_that_are_not_counted(ranks, options, kind):
    if ranks.device != "cpu" and kind in ("numpy", "an array"):
        pytest.skip("NumPy has no memory of a GPU")
    assert all(error < 8 for error in ranks.run(jobs.written_uncounted, options, kind))


@pytest.mark.parametrize("options", STATED, ids=lambda o: "-".join(o.values()))
def test_functional_call_multiplies_the_weight_of_each_call(ranks, options):
    assert all(error < 8 for error in ranks.run(jobs.called_with_weights, options))


@pytest.mark.parametrize("options", STATED, ids=lambda o: "-".join(o.values()))
def test_graphs_of_a_frozen_layer_read_what_was_loaded(ranks, options):
    for forms in ranks.run(jobs.frozen_and_loaded, options):
        assert all(forms)
