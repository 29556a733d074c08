"""Sync plans in the laboratory: what is measured, what is checked, and what is refused."""

import json
from itertools import pairwise

import pytest
import torch

from bench import asked, sweep
from blockshock.phases import axes
from blockshock.phases.engine import Options
from blockshock.phases.session import CaseFailed, Laboratory
from blockshock.phases.transformer import FAMILY, decode, plans, simulation
from blockshock.phases.transformer.axes import expand
from blockshock.phases.transformer.case import TransformerCase
from blockshock.transformer import Decoder, DecoderConfig
from blockshock.transformer.sync import plan
from tests.transformer_laboratory_jobs import TINY, case, truth_of_one_process, wrong

CEILINGS = {
    "matrix_flops": {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11},
    "copy_bytes_per_s": 1e10,
    "link_bytes_per_s": 1e9,
}
SYNCS = {"tp": 8, "spd": 4, "spd_mixed": 3, "spd_2": 2, "spd_4": 1, "desync": 4, "parallel": 4}


@pytest.fixture(scope="module")
def lab(ranks):
    return Laboratory(ranks, Options(rounds=3, seconds=0.01, ceilings=CEILINGS))


@pytest.mark.parametrize(
    ("phase", "methods"),
    [
        ("sync", ["tp", "spd_2", "desync"]),
        ("decode", ["tp", "spd_2", "desync"]),
        pytest.param("decode", list(SYNCS), marks=pytest.mark.slow),
    ],
)
def test_every_plan_passes_its_check_and_is_measured_beside_the_others(lab, phase, methods):
    point = [case(phase, method) for method in methods]
    for one in point:
        samples, info = lab.result(one, point)
        assert len(samples) == 3
        assert len(info["timing"]["interleaved_with"]) == len(point) - 1
        assert set(info["errors"]) == {"output"} | ({"gradient"} if phase == "sync" else set())
        for figure in info["errors"].values():
            assert figure["relative"] < 1e-5
        rates = info["rates"]
        assert rates["syncs"] == SYNCS[one.method]
        tokens = one.batch * (one.T if phase == "sync" else 1)
        assert min(samples) <= tokens / rates["tokens_per_s"] <= max(samples)
        assert {"forward", "allreduce", "total"} <= set(info["regions"])
        assert ("backward" in info["regions"]) == (phase == "sync")
        # One a sync, forward and backward, and one for the gradients of what all ranks hold.
        expected = 2 * SYNCS[one.method] + 1 if phase == "sync" else SYNCS[one.method]
        assert info["regions"]["allreduce"]["calls"] == expected


def test_bf16_is_held_to_what_bf16_costs_the_simulation(lab):
    for phase in ("sync", "decode"):
        point = [case(phase, "spd_2", dtype="bf16")]
        for one in point:
            for figure in lab.result(one, point)[1]["errors"].values():
                assert 1e-4 < figure["dense_relative"] < 0.5
                assert figure["limit"] < 1.8


@pytest.mark.parametrize("phase", ["sync", "decode"])
def test_a_vocabulary_in_parts_passes_the_same_check(lab, phase):
    point = [case(phase, "spd_2", vocabulary_parallel=True)]
    info = lab.result(point[0], point)[1]
    assert all(figure["relative"] < 1e-5 for figure in info["errors"].values())
    assert info["paths"]["reduce"] == "collective"


@pytest.mark.slow
def test_a_compiled_step_of_decoding_passes_the_same_check(lab):
    point = [case("decode", method, compiled=True) for method in ("tp", "spd_2", "desync")]
    for one in point:
        assert lab.result(one, point)[1]["errors"]["output"]["relative"] < 1e-5


@pytest.mark.slow
def test_compiled_steps_of_training_pass_the_same_check(lab):
    point = [case("sync", method, compiled=True) for method in ("tp", "spd_2", "parallel")]
    for one in point:
        for figure in lab.result(one, point)[1]["errors"].values():
            assert figure["relative"] < 1e-5


@pytest.mark.parametrize(
    ("phase", "kind"),
    [
        ("sync", "another plan"),
        ("sync", "a rank's weight"),
        ("sync", "1% too long"),
        ("sync", "a rank forgets a gradient"),
        ("decode", "another plan"),
        ("decode", "a rank's weight"),
        ("decode", "a rank's cache"),
    ],
)
def test_the_check_fails_where_a_part_is_wrong(ranks, phase, kind):
    assert all(any(faults.values()) for faults, _ in ranks.run(wrong, phase, kind))


SMALL = {
    "no bias": None,
    "1% too long": "length along the truth",
    "half a norm's gradient": "of blocks.3.mlp_norm.weight",
    "half a bias's gradient": "of blocks.3.down.bias",
    "a bucket is doubled": "of blocks.3.",
    "the last sequence is lost": "length along the truth",
}


@pytest.mark.parametrize("kind", SMALL)
def test_in_bf16_the_check_finds_what_is_small_beside_the_whole(ranks, kind):
    for faults, _ in ranks.run(wrong, "sync", kind, "bf16"):
        found = " and ".join(faults["gradient"])
        assert SMALL[kind] in found if SMALL[kind] else not any(faults.values())


@pytest.mark.parametrize("batch", [3, 1])  # fewer than the ranks: one of them has no sequence
def test_the_truth_that_ranks_compute_together_is_that_of_one_process(ranks, batch):
    for errors in ranks.run(truth_of_one_process, ranks.size, batch=batch):
        assert errors.keys() == {"output", "gradient"}
        assert max(errors.values()) < 1e-12


def test_replicas_that_drift_apart_fail(ranks):
    (_, first), (_, second) = ranks.run(wrong, "sync", "a replica drifts")
    assert torch.equal(first["output"], second["output"])
    assert not torch.equal(first["scales"], second["scales"])
    for _, replicated in (pair for pair in ranks.run(wrong, "sync", "nothing")):
        assert replicated["scales"].numel() == 9 * 32


@pytest.mark.parametrize("name", ["8", "4", "3", "2", "1", "parallel", "desync:4", "desync:2"])
def test_one_simulated_rank_is_the_dense_decoder(name):
    config = DecoderConfig(64, 16, 32, 4, 4, kv_heads=2, hidden=64)
    model = Decoder(config, generator=torch.Generator().manual_seed(0)).double()
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    found = simulation.logits(model, plan(name, 4), 1, tokens)
    if name == "parallel":
        assert not torch.allclose(found, model(tokens))
    else:
        torch.testing.assert_close(found, model(tokens), rtol=1e-9, atol=1e-12)


def test_a_plan_with_fewer_syncs_is_another_model_on_two_ranks():
    model = Decoder(case().config, generator=torch.Generator().manual_seed(0)).double()
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        names = "8", "4", "2"
        found = [simulation.logits(model, plan(name, 4), 2, tokens) for name in names]
    torch.testing.assert_close(found[0], model(tokens), rtol=1e-9, atol=1e-12)
    for one, other in pairwise(found):
        assert float((one - other).norm() / one.norm()) > 1e-3


def test_weights_tokens_and_cache_do_not_depend_on_the_plan():
    first, other = (
        decode.Problem(case("decode", method, ranks=1), torch.device("cpu"))
        for method in ("tp", "spd_4")
    )
    assert torch.equal(first.tokens, other.tokens)
    assert torch.equal(first.model.embedding.weight, other.model.embedding.weight)
    assert torch.equal(first.cache(1)[0], other.cache(1)[0])
    assert not torch.equal(first.cache(1)[0], first.cache(2)[0])


def test_names_tell_cases_apart():
    assert case().id == "transformer_sync/tp-32x4-H4-V256-B2-T16-fp32"
    assert case("decode", "spd_2", reduce="exchange").label == "spd_2-exchange"
    assert case("decode", compiled=True, seed=1).point_label.endswith("compiled=True-seed=1")
    assert case(model="tiny").id == case().id
    assert case(method="spd", reduce="two_shot").point == case().point
    assert case("sync").problem_seed == case("decode", "spd").problem_seed


def test_a_plan_is_named_by_its_syncs_at_any_depth():
    for depth in (12, 24):
        for rule, a_block in plans.GROUPS.items():
            found = plan(plans.name(rule, depth), depth)
            assert (found.syncs, found.kind) == (a_block * depth, "group")
    assert plan(plans.name("spd_mixed", 12), 12).groups[5:7] == ((10, 11), (12, 13, 14, 15))
    assert plan(plans.name("desync", 12), 12).kind == "desync"
    assert plan(plans.name("parallel", 12), 12).syncs == 12


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "dense_attention"}, "sync does not measure dense_attention; use one of tp,"),
        ({"method": "spd_5"}, "unknown method 'spd_5'"),
        ({"width": 33}, "width = 33, heads = 4"),
        ({"attention": "flashy"}, "unknown attention 'flashy'"),
        ({"pattern": "band(4)"}, r"pattern = 'band\(4\)': tp takes none"),
        ({"reduce": "sum"}, "unknown reduce 'sum'; use one of auto, collective"),
    ],
)
def test_a_case_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        case(**changed)


def test_what_cannot_run_is_told_before_it_is_run():
    assert case().unsupported("cpu") is None
    assert "fp16 needs a scale" in case(dtype="fp16").unsupported("cuda")
    told = case(method="spd_3").unsupported("cpu")
    assert told == "spd_3 needs a depth that is a multiple of 3, and depth = 4"
    assert "heads = 4 is no multiple of 8 ranks" in case(ranks=8).unsupported("cpu")
    odd = case(vocabulary=63, vocabulary_parallel=True)
    assert "vocabulary = 63 is no multiple of 2 ranks; choose another" in odd.unsupported("cpu")
    assert "needs GPUs" in case(reduce="exchange").unsupported("cpu")
    assert case(reduce="exchange").unsupported("cuda") is None


def test_training_steps_are_never_captured_and_tokens_are():
    assert FAMILY.timings == {"sync": ("events", "sync")}


def test_a_timing_mode_that_a_step_cannot_have_is_refused(ranks):
    lab = Laboratory(ranks, Options(mode="graph", ceilings=CEILINGS))
    with pytest.raises(CaseFailed, match=r"timing mode 'graph': transformer's sync is timed in"):
        lab.result(case(), [case()])


def test_a_sweep_lists_the_plans_of_a_phase_and_the_sums_of_each():
    given = axes.defaults(TransformerCase) | {name: [value] for name, value in TINY.items()}
    listed = axes.listed(TransformerCase, given, "cpu")
    found = expand(TransformerCase, listed, "decode", 2)
    assert [one.label for one in found] == list(plans.PLANS)
    given |= {"method": ["tp", "spd", "dense_attention"], "reduce": {"tp": ["auto", "exchange"]}}
    listed = axes.listed(TransformerCase, given, "cpu")
    labels = [one.label for one in expand(TransformerCase, listed, "sync", 2)]
    assert labels == ["tp-auto", "tp-exchange", "spd"]
    given |= {"method": ["all"], "pattern": ["band(4)", "band(8)"], "reduce": ["collective"]}
    listed = axes.listed(TransformerCase, given, "cpu")
    found = expand(TransformerCase, listed, "hybrid_forward", 2)
    labels = [one.label for one in found]
    assert labels == ["dense_attention", "sparse_attention-band(4)", "sparse_attention-band(8)"]
    assert len({one.point for one in found}) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_sweep_of_plans_has_what_the_study_needs(device):
    loaded = sweep.load("plans", ["transformer"])["transformer"]
    found = sweep.cases(loaded, "decode", device, 2, {})
    assert {one.batch for one in found} == ({1, 16} if device == "cuda" else {1, 2})
    groups = {one.method for one in found if one.method in plans.GROUPS}
    assert groups == set(plans.GROUPS)
    assert all(plans.unsupported(one.method, one.depth) is None for one in found)


def test_its_bench_files_ask_the_family():
    assert asked.BENCHES["sync"] == asked.BENCHES["hybrid"] == "transformer"


def test_the_floor_of_decoding_is_what_a_rank_reads(lab):
    one = case("decode")
    info = lab.result(one, [one])[1]
    weights, cache = info["memory"]["weight_bytes"], info["memory"]["cache_bytes"]
    assert cache == 4 * 2 * (2 * 2 * 16 * 8) * 4  # blocks, k and v, [batch, heads, T, D], fp32
    assert info["model"]["read_bytes"] == weights + cache
    assert info["floor"]["memory"] == (weights + cache) / 1e10
    assert info["floor"]["wire"] == pytest.approx(8 * 2 * 32 * 4 / 1e9)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ranks")
def test_the_bench_file_measures_the_quick_sweep(bench, tmp_path):
    file = tmp_path / "r.json"
    out = bench("--results", str(file), files=("bench/bench_sync.py",))
    out.assert_outcomes(passed=7)
    ids = [entry["extra_info"]["id"] for entry in json.loads(file.read_text())["benchmarks"]]
    assert "transformer_decode/spd_2-64x4-H4-V256-B1-T32-fp32" in ids
