"""What a parameter holds is what is multiplied, whatever was done to the layer before."""

import copy
import re

import pytest
import torch
from torch import nn

from blockshock.linear.part import PartWeight
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
STATED = [options for options in LAYERS if "loads" not in options]
LIVES = [(options, 3 * i + j) for i, options in enumerate(LAYERS) for j in range(3)]


@pytest.mark.parametrize(
    ("options", "seed"), LIVES, ids=[f"{'-'.join(o.values())}-{seed}" for o, seed in LIVES]
)
def test_a_layer_multiplies_its_parameter_whatever_happened(ranks, options, seed):
    for error, deeds in ranks.run(jobs.lives, options, seed):
        assert error < 8, deeds  # in units of the dtype's rounding


def test_a_tensor_takes_dtype_and_device_of_a_part():
    like = PartWeight.of(nn.Parameter(torch.ones(2, dtype=torch.float64)), None)
    assert torch.ones(3).to(like).dtype == torch.float64


def test_a_cast_rounds_neither_a_wide_master_nor_its_gradients(ranks):
    for dtypes, same, output in ranks.run(jobs.cast_with_gradients):
        assert set(dtypes) == {torch.float32}  # CUDA's grouped steps read a gradient as a weight
        assert all(same)
        assert output == torch.float16


@pytest.mark.parametrize("options", STATED, ids=lambda o: "-".join(o.values()))
def test_same_casts_and_loads_of_the_same_mask_move_no_memory_that_a_graph_may_hold(ranks, options):
    assert all(ranks.run(jobs.moved_nowhere, options))


@pytest.mark.parametrize("kind", jobs.REPLACED)
@pytest.mark.parametrize("method", ["block_shock", "masked_split", "dense_tp_row"])
def test_what_would_give_values_of_another_weight_is_refused(ranks, method, kind):
    said = {"another shape": r"\[3, 3\]", "parametrized": "parametrization", "vmap": r"torch\.func"}
    for text in ranks.run(jobs.replaced, method, kind):
        assert re.search(said.get(kind, "than in the forward of this backward"), text)


@pytest.mark.parametrize("method", ["block_shock", "dense_tp_column"])
def test_a_weight_is_a_part_after_a_load_that_swaps_tensors(ranks, method):
    assert set(ranks.run(jobs.loaded_by_swapping, method)) == {PartWeight}


PRODUCTS = [
    lambda x, weight: torch.nn.functional.linear(x, weight),
    lambda x, weight: x @ weight.t(),
    lambda x, weight: x @ weight.T,
    lambda x, weight: weight @ x.t(),
    lambda x, weight: x @ weight,
    lambda x, weight: torch.einsum("bk,nk->bn", x, weight),
    lambda x, weight: torch.nn.functional.embedding(x.long(), weight),
    torch.compile(lambda x, weight: torch.nn.functional.linear(x, weight), backend="eager"),
]


@pytest.mark.parametrize("product", PRODUCTS, ids=range(len(PRODUCTS)))
def test_a_product_by_a_part_is_refused(product):
    weight = PartWeight(torch.ones(64, 64))
    for part in (weight, copy.deepcopy(weight), nn.ParameterList([weight]).double()[0]):
        with pytest.raises(RuntimeError, match="one rank's part"):
            product(torch.zeros(8, 64, dtype=part.dtype), part)
    assert type(weight.detach()) is torch.Tensor  # so is what a state_dict holds
