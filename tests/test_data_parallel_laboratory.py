"""Data parallelism in the laboratory: what is measured, what is checked, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from bench import asked
from blockshock.data_parallel import METHODS
from blockshock.measure import datasheet
from blockshock.phases import axes
from blockshock.phases.data_parallel import FAMILY, figures
from blockshock.phases.data_parallel.axes import expand
from blockshock.phases.data_parallel.case import DataParallelCase
from blockshock.phases.data_parallel.problem import Problem, read
from blockshock.phases.engine import Options
from blockshock.phases.session import CaseFailed, Laboratory
from blockshock.transformer import counts
from tests.data_parallel_laboratory_jobs import (
    TINY,
    case,
    outcomes,
    truth_of_one_process,
    wrong,
)

CEILINGS = {
    "matrix_flops": {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11},
    "copy_bytes_per_s": 1e10,
    "link_bytes_per_s": 1e9,
}


@pytest.fixture(scope="module")
def lab(ranks):
    return Laboratory(ranks, Options(rounds=3, ceilings=CEILINGS))


@pytest.mark.parametrize("phase", FAMILY.phases)
def test_every_method_passes_its_check_and_is_measured_beside_the_others(lab, phase):
    methods = list(METHODS) if phase == "training" else ["none", "overlapped", "fully_sharded"]
    steps = {"steps": 3} if phase == "lm" else {}
    point = [case(phase, method, **steps) for method in methods]
    for one in point:
        samples, info = lab.result(one, point)
        assert len(samples) == 3
        assert len(info["timing"]["interleaved_with"]) == len(point) - 1
        assert set(info["errors"]) <= {"gradient", "update"}
        assert info["errors"]["gradient"]["relative"] < 1e-5
        # What is exchanged is in each phase that trains held to whole steps as well.
        exchanges, trains = one.method != "none", phase != "gradients"
        assert ("update" in info["errors"]) == (exchanges and trains)
        model, rates = info["model"], info["rates"]
        tokens = one.ranks * one.batch * one.T
        median = tokens / rates["tokens_per_s"]
        assert min(samples) <= median <= max(samples)
        flops = tokens / one.ranks * counts(one.config).flops_per_token
        assert rates["mfu"] == pytest.approx(flops / median / 1e11)
        assert model["datasheet_flops"] is None
        assert (info["memory"]["optimizer_bytes"] is None) == (phase not in ("training", "lm"))
        assert {"forward", "backward", "sync", "total"} <= set(info["regions"])


def test_bf16_is_held_to_what_bf16_costs_one_process(lab):
    point = [
        case("correctness", "overlapped", dtype="bf16"),
        case("correctness", "fully_sharded", dtype="bf16", compute_dtype="bf16"),
    ]
    for one in point:
        for figure in lab.result(one, point)[1]["errors"].values():
            assert 1e-4 < figure["dense_relative"] < 0.5
            assert figure["limit"] < 1.6


def test_checkpointed_blocks_pass_the_same_check(lab):
    point = [case("gradients", name, checkpointed=True) for name in ("overlapped", "fully_sharded")]
    for one in point:
        assert lab.result(one, point)[1]["errors"]["gradient"]["relative"] < 1e-5


def test_a_timing_mode_that_its_steps_cannot_have_is_refused(ranks):
    lab = Laboratory(ranks, Options(mode="graph", ceilings=CEILINGS))
    with pytest.raises(CaseFailed, match=r"timing mode 'graph': data_parallel's \w+ is timed in"):
        lab.result(case(), [case()])


def test_sharded_methods_hold_their_share_alone(lab):
    point = [case("training", method) for method in METHODS]
    memory = {one.method: lab.result(one, point)[1]["memory"] for one in point}
    weights, state = (
        {name: one[key] / memory["none"][key] for name, one in memory.items()}
        for key in ("weight_bytes", "optimizer_bytes")
    )
    for name in METHODS:
        assert weights[name] == pytest.approx(0.5 if "fully" in name or "fsdp" in name else 1, 0.1)
        assert state[name] == pytest.approx(
            0.5 if "sharded" in name or "fsdp" in name else 1, abs=0.1
        )


def test_losses_of_the_first_steps_are_those_of_every_method_that_trains_all_ranks_as_one(lab):
    point = [case("lm", method, steps=3) for method in ("none", "overlapped", "fully_sharded")]
    losses = {one.method: lab.result(one, point)[1]["curves"]["loss"] for one in point}
    assert losses["overlapped"] == pytest.approx(losses["fully_sharded"], rel=1e-5)
    assert losses["none"][0] == pytest.approx(losses["overlapped"][0], rel=1e-6)
    assert losses["none"][2] != pytest.approx(losses["overlapped"][2], rel=1e-5)
    assert len(losses["none"]) == 3
    info = lab.result(point[0], point)[1]
    assert info["rates"]["loss"] == losses["none"][-1]


FAULTS = ["sum, no mean", "1% too long", "a tensor is lost", "a rank forgets a tensor"]
OF_LENGTH = FAULTS[:2]


@pytest.mark.parametrize("kind", ["nothing", *FAULTS])
def test_the_check_fails_where_gradients_are_wrong(ranks, kind):
    for faults in ranks.run(wrong, kind, "fp32"):
        assert set(faults) == {"gradient", "update"}
        # Clipping makes a longer gradient as long as the right one: steps alone would not tell.
        assert bool(faults["gradient"]) == (kind != "nothing")
        if kind not in OF_LENGTH:
            assert bool(faults["update"]) == (kind != "nothing")


SMALL = {
    "no bias": None,
    "1% too long": "length along the truth",
    "a rank forgets a tensor": "of head.norm.weight",
    "a rank forgets a bias": "of blocks.0.down.bias",
    "a bucket is doubled": "norm.weight",
    "the last sequence is lost": "length along the truth",
}


@pytest.mark.parametrize("kind", SMALL)
def test_in_bf16_the_check_finds_what_is_small_beside_the_whole(ranks, kind):
    for faults in ranks.run(wrong, kind, "bf16"):
        found = " and ".join(faults["gradient"])
        assert SMALL[kind] in found if SMALL[kind] else not any(faults.values())


@pytest.mark.parametrize("kind", FAULTS)
def test_a_method_with_wrong_gradients_is_not_timed(ranks, kind):
    for faulty, other in ranks.run(outcomes, kind, Options(rounds=3, ceilings=CEILINGS)):
        assert "naive-32x1-V256-B2-T16-fp32 is wrong, so it is not timed" in faulty["failed"]
        assert "times" not in faulty
        assert len(other["times"]) == 3


def test_the_truth_that_ranks_compute_together_is_that_of_one_process(ranks):
    for gradient, update in ranks.run(truth_of_one_process, ranks.size):
        assert gradient < 1e-12
        assert update < 1e-9


def test_the_first_weights_and_the_text_are_the_same_for_every_method_and_phase():
    first, other = (Problem(replace(case(), ranks=1), torch.device("cpu")) for _ in range(2))
    assert torch.equal(first.start, other.start)
    assert torch.equal(first.tokens, other.tokens)
    tokens, targets = first.own(0)
    assert tokens.shape == targets.shape == (2, 16)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert not torch.equal(first.own(1)[0], tokens)


def test_a_text_is_read_as_bytes_and_begins_again(tmp_path):
    (tmp_path / "text").write_bytes(b"abc")
    assert bytes(read(str(tmp_path / "text"), 7).tolist()) == b"abcabca"
    assert len(read("python", 100_000)) == 100_000
    with pytest.raises(ValueError, match="cannot be read"):
        read(str(tmp_path / "nothing"), 7)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is empty: name a file"):
        read(str(tmp_path / "empty"), 7)


def test_a_text_that_cannot_be_read_is_the_refusal_of_its_cases(lab):
    one = case(text="/nowhere/text")
    with pytest.raises(CaseFailed, match="text '/nowhere/text' cannot be read"):
        lab.result(one, [one])


def test_names_tell_cases_apart():
    assert case().id == "data_parallel_training/flat-32x1-V256-B2-T16-fp32"
    assert case("lm", steps=9, attention="flex").point_label == "32x1-V256-B2-T16-fp32-flex-steps9"
    assert case(method="overlapped").label == "overlapped"
    assert case(method="overlapped", bucket_mib=5).label == "overlapped-5MiB"
    assert case(method="overlapped", bucket_mib=25) == case(method="overlapped")
    assert case(heads=4).point_label == "32x1-H4-V256-B2-T16-fp32"
    assert case(compiled=True, seed=1, text="a/b").point_label.endswith(
        "compiled=True-text=a~b-seed=1"
    )
    assert case(model="small").id == case().id
    assert case("lm").steps == 20
    assert case(method="overlapped", bucket_mib=5).point == case(method="none").point


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "none", "bucket_mib": 5}, "none does not take bucket_mib; leave it out"),
        ({"width": 33}, "width = 33, heads = 1"),
        ({"attention": "flashy"}, "unknown attention 'flashy'; use one of reference"),
        ({"vocabulary": 200}, "vocabulary = 200 must be a whole number, 256 or more"),
        ({"compute_dtype": "fp32", "method": "fully_sharded"}, "unknown compute_dtype 'fp32'"),
    ],
)
def test_a_case_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        case(**changed)


def test_what_cannot_run_is_told_before_it_is_run():
    assert case().unsupported("cpu") is None
    assert "fp16 needs a scale" in case(dtype="fp16").unsupported("cuda")
    assert "runs on CUDA only" in case(attention="sdpa_flash").unsupported("cpu")
    assert case(attention="sdpa_flash", dtype="bf16").unsupported("cuda") is None


def test_options_are_those_that_a_method_takes():
    given = axes.defaults(DataParallelCase) | {name: [value] for name, value in TINY.items()}
    given |= {"method": ["none", "overlapped", "fully_sharded"], "bucket_mib": [5, 25]}
    given |= {"compute_dtype": {"fully_sharded": [None, "bf16"]}}
    listed = axes.listed(DataParallelCase, given, "cpu")
    labels = [one.label for one in expand(DataParallelCase, listed, "training", 2)]
    assert labels == [
        "none", "overlapped-5MiB", "overlapped", "fully_sharded", "fully_sharded-compute=bf16",
    ]  # fmt: skip


def test_two_bench_files_ask_the_family_for_its_phases():
    found = {name: asked.BENCHES[name] for name in ("data_parallel", "lm")}
    assert set(found.values()) == {"data_parallel"}
    assert set(FAMILY.benches) == {"lm"}


def test_steps_are_never_captured():
    assert FAMILY.timings.keys() == FAMILY.phases.keys()
    assert set(FAMILY.timings.values()) == {("events", "sync")}


def test_the_floor_is_the_larger_of_arithmetic_traffic_and_wire(ranks):
    (one, *_) = ranks.run(floors)
    assert one["none"]["wire"] == 0
    assert one["flat"]["wire"] == pytest.approx(4 * one["parameters"] / 1e9)
    assert one["flat"]["seconds"] == max(one["flat"][k] for k in ("compute", "memory", "wire"))


def floors():
    from blockshock.phases.data_parallel import steps

    found = {"parameters": counts(case().config).parameters}
    for method in ("none", "flat"):
        one = case(method=method)
        problem = Problem(one, torch.device("cpu"))
        run = steps.Run(one, problem)
        experiment = steps.training(one, run, problem)
        found[method] = figures.figures(one, run, problem, experiment, CEILINGS)["floor"]
    return found


def test_the_rate_of_the_data_sheet_is_that_of_a_known_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert datasheet.bf16_flops(torch.device("cuda", 0)) == 989.4e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H2000")
    assert datasheet.bf16_flops(torch.device("cuda", 0)) is None
    assert datasheet.bf16_flops(torch.device("cpu")) is None


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ranks")
def test_the_bench_files_measure_the_quick_sweep(bench, tmp_path):
    file = tmp_path / "r.json"
    files = ("bench/bench_data_parallel.py", "bench/bench_lm.py")
    out = bench("--results", str(file), "--set", "method=none,flat", files=files)
    out.assert_outcomes(passed=8)
    ids = [entry["extra_info"]["id"] for entry in json.loads(file.read_text())["benchmarks"]]
    assert "data_parallel_lm/flat-64x2-V256-B2-T32-fp32-steps5" in ids
