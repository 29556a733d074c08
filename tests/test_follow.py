"""What a parameter holds is what is multiplied, whatever was done to the layer before."""

import pytest

from tests import follow_jobs as jobs

LAYERS = [
    {"mask": "tile"},
    {"mask": "1100"},
    {"mask": "magnitude"},
    {"mask": "tile_magnitude", "loads": "tile"},
    {"mask": "tile", "master": "float32"},
    {"mask": "1100", "master": "float32"},
    {"mask": "tile", "master": "dense"},
    {"mask": "magnitude", "master": "dense"},
]


@pytest.mark.parametrize("options", LAYERS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("seed", range(6))
def test_a_layer_multiplies_its_parameter_whatever_happened(ranks, options, seed):
    for error, deeds in ranks.run(jobs.lives, options, seed):
        assert error < 8, deeds  # in units of the dtype's rounding
