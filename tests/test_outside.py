"""The layers outside the laboratory: compiled, captured, under autocast, saved, in real blocks."""

import pytest
import torch

from blockshock.linear import METHODS
from tests import outside_jobs as jobs

EXACT = 1e-7  # an error below float32's own: a gradient of few addends may be exact in dense
LAYERS = [
    ("block_shock", {"mask": "tile"}),
    ("block_shock", {"mask": "1100"}),
    ("block_shock", {"mask": "magnitude", "master": "dense"}),
    ("block_shock", {"mask": "tile", "master": "float32"}),
    ("dense_tp_row", {}),
]
SAVED = [
    ("block_shock", {"mask": "tile"}),
    ("block_shock", {"mask": "tile_magnitude"}),
    ("block_shock", {"mask": "tile_magnitude", "master": "dense"}),
    ("block_shock", {"mask": "tile_magnitude", "master": "float32"}),
    ("block_shock", {"mask": "1100"}),
    ("block_shock_folded", {}),
    ("masked_split", {"mask": "tile_magnitude"}),
    ("dense_tp_row", {}),
    ("dense_tp_column", {}),
]


def identify(value):
    return "-".join(value.values()) if isinstance(value, dict) else str(value)


# "aot_eager" traces as "inductor" does, and makes no code of its own: one layer of each class
# shows that its code is right.
COMPILED = [
    *[(*layer, "aot_eager") for layer in LAYERS],
    *[pytest.param(*LAYERS[i], "inductor", marks=pytest.mark.slow) for i in (0, -1)],
]


@pytest.mark.parametrize(("method", "options", "backend"), COMPILED, ids=identify)
def test_a_compiled_model_is_the_eager_one_and_compiles_once(ranks, method, options, backend):
    # In bf16 a norm's gradients are 0.02 from the truth, eager, and fused rounds otherwise.
    limit = 0.1 if ranks.device == "cuda" else 1e-5
    for errors, graphs in ranks.run(jobs.compiled, method, options, backend, timeout=300):
        assert max(errors) < limit, errors
        assert 0 < graphs[0] <= 12  # the pieces between four layers
        assert graphs[0] == graphs[-1], graphs


@pytest.mark.parametrize("inside", [False, True], ids=["backward-outside", "backward-inside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("method", ["block_shock", "masked_split", "dense_tp_row"])
def test_under_autocast_a_layer_computes_in_its_own_dtype(ranks, method, dtype, inside):
    size = {"device_type": ranks.device, "ranks": ranks.size}
    if reason := METHODS[method].unsupported(128, 256, dtype=dtype, **size):
        pytest.skip(reason)
    for answer in ranks.run(jobs.autocast, method, dtype, inside):
        y_dtype, dx_dtype, equal, refused = answer
        assert (y_dtype, dx_dtype) == (dtype, torch.float32)
        assert all(equal), equal
        assert "convert one of them" in refused


@pytest.mark.parametrize(("method", "options"), SAVED, ids=identify)
def test_a_state_dict_loads_into_a_layer_of_another_weight(ranks, method, options):
    for equal in ranks.run(jobs.loaded, method, options):
        assert all(equal.values()), equal


@pytest.mark.parametrize(("method", "options"), SAVED, ids=identify)
def test_a_distributed_checkpoint_restores_model_and_optimizer(ranks, tmp_path, method, options):
    answers = ranks.run(jobs.checkpointed, str(tmp_path / "saved"), method, options)
    for rank, (equal, keys) in enumerate(answers):
        assert all(equal), equal
        own = [key for key in keys if key.startswith("up.weight")]
        assert len(own) == 1
        assert own[0].startswith(f"up.weight.{method}")  # another method's weight is another thing
        assert own[0].endswith(f".rank{rank}of{ranks.size}")
        assert {"up.bias", "norm1.weight", "qkv.weight"} <= set(keys)


def test_a_checkpoint_of_other_ranks_is_one_clear_error(ranks, tmp_path):
    for texts, ending, untouched in ranks.run(jobs.wrong_checkpoints, str(tmp_path)):
        assert untouched
        assert all(f"'up.weight{ending}'" in text for text in texts.values())
        assert f"parts of {2 * ranks.size} ranks" in texts["ranks"]
        assert "another model or method" in texts["method"]
        assert "before `convert`" in texts["dense"]


@pytest.mark.parametrize("kind", jobs.MODELS)
@pytest.mark.parametrize(("method", "options"), [*LAYERS, ("dense_tp_column", {})], ids=identify)
def test_a_transformer_block_trains_as_the_dense_one(ranks, kind, method, options):
    linears = {"block": ["qkv", "out", "up", "down"], "encoder_layer": ["linear1", "linear2"]}
    for errors, replaced, left in ranks.run(jobs.real_block, kind, method, options):
        assert replaced == linears[kind]
        assert list(left) == (["self_attn.out_proj"] if kind == "encoder_layer" else [])
        assert {"y", "x", "eval", f"{replaced[0]}.weight", f"{replaced[0]}.bias moved"} <= set(
            errors
        )
        bad = {n: (e, d) for n, (e, d) in errors.items() if e > max(2 * d, EXACT)}
        assert not bad, bad


@pytest.mark.parametrize("masked", [0, 7])
def test_an_encoder_of_pytorch_in_eval_calls_the_converted_layers(ranks, masked):
    limit = 1e-3 if ranks.device == "cuda" else 1e-5  # the GPU may multiply in TF32
    for converted, reverted in ranks.run(jobs.in_an_encoder, masked):
        assert converted < limit
        assert reverted < limit
