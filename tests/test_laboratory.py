"""The laboratory measures what it says, and one case's failure costs nothing but that case."""

import math
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blockshock.distributed import Ranks
from blockshock.linear import METHODS
from blockshock.measure import clock
from blockshock.phases import engine, profiling, session
from blockshock.phases.engine import Options
from blockshock.phases.linear.case import LinearCase as Case
from blockshock.phases.linear.problem import Problem
from blockshock.phases.session import CaseFailed, Laboratory
from tests import faulty

REGIONS = {
    "forward": {"forward", "allreduce", "total"},
    "backward": {"forward", "backward", "allreduce", "total"},
    "training": {"forward", "loss", "backward", "allreduce", "optimizer", "compress", "total"},
}


@pytest.fixture(scope="module", autouse=True)
def two_ranks(ranks):
    if ranks.size != 2:
        pytest.skip(f"these cases are for two ranks, {ranks.size} run")


@pytest.fixture(scope="module")
def lab(ranks):
    return Laboratory(ranks, Options(rounds=8))


@pytest.fixture
def options(lab):
    """Options of a new laboratory on the same machine, whose ceilings are known already."""
    lab.ceilings()
    return partial(replace, lab.options)


@pytest.fixture
def faults(monkeypatch):
    """The faulty methods, known here and, through a stand-in for the engine, in the ranks."""
    for name, cls in faulty.FAULTS.items():
        monkeypatch.setitem(METHODS, name, cls)
    monkeypatch.setattr(engine, "measure_point", faulty.measure_point)


def cases(phase, methods, **options):
    return [Case(phase, method, N=128, B=32, **options) for method in methods]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_result_says_everything_the_schema_promises(lab, phase):
    point = cases(phase, ["dense_tp_row", "block_shock"], mask=None)
    samples, info = lab.result(point[1], point)
    assert len(samples) == 8
    assert all(math.isfinite(sample) and sample > 0 for sample in samples)
    assert info["schema"] == session.SCHEMA
    assert info["id"] == f"{phase}/block_shock-N128-B32-bf16"
    assert set(info["regions"]) == REGIONS[phase]
    assert info["errors"]["output"]["ratio"] <= info["errors"]["output"]["limit"] < 1.6
    assert info["timing"]["interleaved_with"] == ["dense_tp_row"]
    assert info["floor"]["seconds"] == max(
        info["floor"][term] for term in ("compute", "memory", "wire")
    )
    assert info["rates"]["limit_fraction"] > 0
    assert info["rates"]["tokens_per_s"] == pytest.approx(32 / statistics.median(samples))
    assert info["memory"]["weight_bytes"] > 0
    assert "build_peak_bytes" in info["memory"]
    assert info["timing"]["l2"] == "warm"
    assert set(info["paths"]) >= {"forward", "backward"}
    assert info["usual"]["mask"] == info["usual_mask"] == "tile"
    assert set(info["usual"]) == {"mask", "kernel", "reduce"}


@pytest.mark.parametrize("policy", ["frozen", "dense_master", "packed_master", "float32_master"])
def test_a_training_step_is_told_apart_in_regions(lab, policy):
    case = Case("training", "block_shock", 128, 32, mask="tile", policy=policy, optimizer="adam")
    _, info = lab.result(case, [case])
    expected = REGIONS["training"] - ({"compress"} if policy == "frozen" else set())
    assert set(info["regions"]) == expected
    parts = sum(info["regions"][name]["p50"] for name in expected - {"total", "allreduce"})
    assert parts <= 1.5 * info["regions"]["total"]["p50"]
    checked = {"output", "grad_input"} if policy == "frozen" else {"weight_update"}
    assert set(info["errors"]) == {*checked, "grad_bias"}


def test_layout_fixes_are_counted_with_their_bytes(lab):
    case = Case("forward", "dense_tp_column", 128, 32)
    _, info = lab.result(case, [case])
    fix = info["regions"]["layout_fix"]
    assert (fix["calls"], fix["bytes"]) == (1, 32 * 128 * 2)


def test_drift_stands_beside_plain_dense(lab):
    case = Case("drift", "block_shock", 128, 32, mask="tile", steps=6)
    _, info = lab.result(case, [case])
    method, dense = info["drift"]["method"], info["drift"]["dense"]
    assert len(method) == len(dense) == 6
    assert dense[0] < dense[-1] < 0.1
    assert all(0.5 * d < m < 2 * d for m, d in zip(method, dense, strict=True))


def test_a_host_that_idles_between_rounds_changes_no_time(ranks, options):
    case = Case("forward", "dense_single", 128, 32)
    samples = {}
    for pause in (0.0, 0.005):
        measured, info = Laboratory(ranks, options(rounds=15, pause=pause)).result(case, [case])
        samples[pause] = statistics.median(measured) * info["timing"]["calls_per_sample"]
    # What leaked would add up to 5 ms to every sample, which is many calls long.
    assert abs(samples[0.005] - samples[0.0]) < 0.002


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raises", "no such shard"),
        ("exits", "exited with code 7"),
        pytest.param("hangs", "did not answer", marks=pytest.mark.slow),
        ("killed", "SIGKILL"),
        pytest.param("outofmemory", "out of memory", marks=pytest.mark.slow),
        ("wrong", "is wrong, so it is not timed"),
        ("otherbits", "not the same bits"),
    ],
)
def test_a_faulty_method_is_named_and_its_neighbours_are_measured(
    ranks, faults, options, fault, told
):
    deadline = 10.0 if fault == "hangs" else 15.0  # the hanging one waits all of it
    lab = Laboratory(ranks, options(rounds=5), deadline=deadline)
    point = cases("forward", ["dense_single", fault, "dense_tp_row"])
    with pytest.raises(CaseFailed, match=told):
        lab.result(point[1], point)
    for case in (point[0], point[2]):
        samples, info = lab.result(case, point)
        assert len(samples) == 5
        assert fault not in info["timing"]["interleaved_with"]


def small_room(cases, options):
    """engine.measure_point in a rank whose memory is full after the first case."""
    rooms, held = iter([2.0, 0.5, 0.5]), iter(range(99))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.memory, "room", lambda device: next(rooms))
        patch.setattr(engine.memory, "reserved", lambda device: next(held))
        return faulty.MEASURE_POINT(cases, options)


def test_a_case_is_put_off_where_less_is_free_than_the_one_before_it_took(
    ranks, options, monkeypatch
):
    monkeypatch.setattr(engine, "measure_point", small_room)
    point = cases("forward", ["dense_single", "dense_tp_row", "dense_tp_column"])
    lab = Laboratory(ranks, options(rounds=5), deadline=15.0)
    for case in point:
        assert lab.result(case, point)[1]["timing"]["interleaved_with"] == []


@pytest.mark.gpus(2)
@pytest.mark.parametrize("method", ["dense_tp_row", "dense_tp_column"])
def test_a_shard_is_built_without_the_whole_weight(lab, method):
    case = Case("forward", method, 16384, 16)
    memory = lab.result(case, [case])[1]["memory"]
    block = 1024 * 16384 * 2
    drawn = 256 * 16384 * 4
    assert memory["build_peak_bytes"] < memory["weight_bytes"] + 3 * block + 3 * drawn


@pytest.mark.gpus(2)
@pytest.mark.parametrize("mask", ["tile", "tile_magnitude", "1100"])
def test_a_term_is_built_in_its_own_memory_and_some_blocks(lab, mask):
    case = Case("forward", "block_shock", 32768, 16, mask=mask)
    memory = lab.result(case, [case])[1]["memory"]
    whole = 32768 * 32768 * 2
    # Some blocks of rows, and the scores of the 90 tiles; whatever N is.
    assert (
        memory["build_peak_bytes"] < memory["weight_bytes"] + 2**30 < memory["weight_bytes"] + whole
    )


def test_a_weight_with_nan_ends_in_a_message_that_names_the_place(ranks, options, tmp_path):
    numpy = pytest.importorskip("numpy")
    weight = numpy.ones((128, 128), dtype=numpy.float32)
    weight[77, 3] = numpy.nan
    numpy.save(tmp_path / "bad.npy", weight)
    lab = Laboratory(ranks, options(rounds=5), deadline=15.0)
    case = Case("forward", "block_shock", 128, 32, mask="tile", weight=str(tmp_path / "bad.npy"))
    with pytest.raises(CaseFailed, match=r"77.*3"):
        lab.result(case, [case])


def test_a_weight_from_a_file_is_measured(ranks, options, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_file({"mlp.up": torch.randn(128, 64), "mlp.down": torch.randn(64, 128)}, path)
    case = Case(
        "backward", "block_shock", 128, 32, K=64, mask="tile_magnitude", weight=f"{path}:mlp.up"
    )
    _, info = Laboratory(ranks, options(rounds=5)).result(case, [case])
    assert info["case"]["weight"].endswith("mlp.up")


def test_an_activation_from_a_file_and_options_of_an_input_are_measured(ranks, options, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "acts.safetensors"
    safetensors.save_file({"layer.3": torch.randn(40, 128), "other": torch.randn(4, 4)}, path)
    lab = Laboratory(ranks, options(rounds=5), deadline=15.0)
    for text in (f"file:{path}:layer.3", "mlp:activation=swiglu+layer_norm=true"):
        case = Case("forward", "dense_single", 128, 32, input=text)
        assert lab.result(case, [case])[1]["case"]["input"] == text
    for text, told in ((f"file:{path}:layer.4", "layer.3"), ("mlp:activated=gelu", "activated")):
        case = Case("forward", "dense_single", 128, 32, input=text)
        with pytest.raises(CaseFailed, match=told):
            lab.result(case, [case])


class Largest(TorchDispatchMode):
    """Notes the most entries of a result in the truth's dtype."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.entries = max(self.entries, result.numel())
        return result


@pytest.mark.parametrize("truth", ["output", "grad_input", "grad_weight_error"])
def test_the_truth_is_computed_in_row_blocks(truth):
    problem = Problem(Case("correctness", "dense_single", 4096, 8, K=128), torch.device("cpu"))
    with Largest() as largest:
        getattr(problem, truth)
    assert 0 < largest.entries <= 1024 * 128


def test_inputs_with_a_mean_train_at_a_rate_that_does_not_explode(lab):
    case = Case("training", "dense_single", 64, 128, K=128, policy="plain", optimizer="sgd")
    lab.result(case, [case])
    steep = replace(case, input="mlp", dtype="fp32")
    _, info = lab.result(steep, [steep])
    assert info["errors"]["weight_update"]["dense_relative"] < 0.01


def test_a_case_for_other_ranks_is_refused(lab):
    case = Case("forward", "dense_single", 128, 32, ranks=4)
    with pytest.raises(CaseFailed, match="for 4 ranks and 2 run"):
        lab.result(case, [case])


def test_profile_writes_a_trace_and_a_kernel_table(ranks, options, tmp_path):
    lab = Laboratory(ranks, options(rounds=5, profile=str(tmp_path)))
    case = Case("backward", "dense_tp_row", 128, 32)
    _, info = lab.result(case, [case])
    trace, table = (f"{info['profile']}{end}" for end in (".trace.json", ".kernels.txt"))
    assert "traceEvents" in (tmp_path / trace).read_text()
    assert "allreduce" in (tmp_path / table).read_text().lower()


def test_a_name_too_long_for_a_file_is_cut_and_told_apart(ranks, options, tmp_path):
    numpy = pytest.importorskip("numpy")
    lab = Laboratory(ranks, options(rounds=5, profile=str(tmp_path)))
    paths = [tmp_path / ("folder" * 20) / ("weight" * 20) / f"{name}.npy" for name in "ab"]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        numpy.save(path, numpy.ones((128, 128), dtype=numpy.float32))
        case = Case("forward", "dense_single", 128, 32, weight=str(path))
        _, info = lab.result(case, [case])
        assert Path(f"{info['profile']}.kernels.txt").exists()
    written = [path for path in tmp_path.iterdir() if path.suffix == ".txt"]
    assert len(written) == 2  # none over the other, and none in a folder of its own
    assert profiling.file_name("forward-short") == "forward-short"
    assert profiling.file_name("w=a/b") != profiling.file_name("w=a_b")


def test_a_check_runs_a_case_once_and_times_nothing(lab, faults):
    (right, wrong) = cases("forward", ["dense_tp_row", "wrong"])
    assert lab.check(right) is None
    with pytest.raises(CaseFailed, match="is wrong, so it is not timed"):
        lab.check(wrong)
    with pytest.raises(CaseFailed, match="for 4 ranks"):
        lab.check(replace(right, ranks=4))


@pytest.mark.slow
def test_three_ranks_measure_what_they_can(options):
    with Ranks(3, device="cpu") as three:
        case = Case("forward", "dense_tp_row", 192, 32, ranks=3)
        samples, info = Laboratory(three, options(rounds=5)).result(case, [case])
        assert len(samples) == 5
        assert info["errors"]["output"]["limit"] == pytest.approx(2.0, rel=0.05)
    assert "even number" in Case("forward", "block_shock", 192, 32, ranks=3).unsupported("cpu")


def test_times_that_are_no_times_are_refused():
    assert clock.slowest([[1.0, 4.0], [2.0, 3.0]], calls=2) == [1.0, 2.0]
    for bad in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(ValueError, match="not positive"):
            clock.slowest([[1.0, bad]], calls=1)


def test_a_timing_mode_of_another_device_is_refused():
    with pytest.raises(ValueError, match="valid there: host"):
        clock.Stopwatch("graph", torch.device("cpu"), None)
    with pytest.raises(ValueError, match="valid there: graph, events, sync"):
        clock.Stopwatch("host", torch.device("cuda"), None)
