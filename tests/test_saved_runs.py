"""pytest-benchmark's own workflow on our benchmarks: save, compare, gate, draw, profile."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import saved_runs
from blockshock.phases.session import Laboratory

ROOT = Path(__file__).parents[1]
SMALL = ("--set", "N=64", "--set", "B=8", "--set", "method=dense_single,dense_tp_row")


@pytest.fixture
def forward(bench, tmp_path, monkeypatch):
    """Runs two forward cases; saved runs lie in tmp_path/saved. Their times are made up."""
    turns = itertools.count(1)

    def ceilings(self):
        self.options = replace(self.options, ceilings={"measured": next(turns)})

    def result(self, case, neighbours):
        return [1e-3 + 1e-6 * next(turns) for _ in range(5)], {"schema": 1, "id": case.id}

    monkeypatch.setattr(Laboratory, "ceilings", ceilings)
    monkeypatch.setattr(Laboratory, "result", result)

    def run(*args):
        storage = f"--benchmark-storage=file://{tmp_path}/saved"
        return bench(*SMALL, *args, storage, files=["bench/bench_linear.py::bench_forward"])

    return run


def saved(tmp_path):
    return sorted(file.name for file in tmp_path.glob("saved/*/*.json"))


def said(out):
    return [*out.outlines, *out.errlines]


def test_a_saved_run_is_what_the_next_one_is_compared_with(forward, tmp_path):
    first = forward("--benchmark-autosave", "--benchmark-compare")
    first.stdout.fnmatch_lines(["benchmark: no run is saved yet*nothing to compare with"])
    forward("--benchmark-save=second").assert_outcomes(passed=2)
    assert [name[:11] for name in saved(tmp_path)] == [saved(tmp_path)[0][:11], "0002_second"]
    latest, chosen = forward("--benchmark-compare"), forward("--benchmark-compare=0001")
    for out, number in ((latest, "0002"), (chosen, "0001")):
        assert out.ret == 0
        out.stdout.fnmatch_lines([f"bench_forward?dense_single-N64*({number}_*"])
        out.stdout.fnmatch_lines(["bench_forward?dense_tp_row-N64*(NOW)*"])
        # The ceilings of a machine are measured anew by each run: they are no other machine.
        assert not any("elsewhere" in line or "machine_info" in line for line in said(out))


def test_another_machine_is_said_in_a_line(forward, tmp_path):
    forward("--benchmark-save=first")
    (file,) = tmp_path.glob("saved/*/*.json")
    content = json.loads(file.read_text())
    content["machine_info"]["blockshock"]["torch"] = "1.0"
    content["machine_info"]["node"] = "elsewhere"
    file.write_text(json.dumps(content))
    out = forward("--benchmark-compare")
    assert out.ret == 0
    lines = [line for line in said(out) if "torch 1.0 -> " in line]
    assert len(lines) == 1
    assert len(lines[0]) < 200


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--benchmark-compare=0099"], "--benchmark-compare=0099: there is no such saved run in"),
        (["--benchmark-compare=a/b/c"], "--benchmark-compare=a/b/c: there is no such saved run"),
        (["--benchmark-compare", "--benchmark-compare-fail=min:5%"], "saved are: none"),
        (["--benchmark-compare-fail=min:5%"], "needs a saved run to compare with: add"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_error_before_measuring(forward, args, message):
    out = forward(*args)
    assert out.ret == pytest.ExitCode.USAGE_ERROR
    assert any(message in line for line in said(out))
    assert not any("Traceback" in line or "INTERNALERROR" in line for line in said(out))


def test_a_regression_fails_the_run_after_its_results_are_kept(forward, tmp_path):
    forward("--benchmark-save=first")
    gate = ("--benchmark-compare", "--results", tmp_path / "r.json")
    failed = forward(*gate, "--benchmark-compare-fail=min:0.000000000001", "--benchmark-save=x")
    passed = forward(*gate, "--benchmark-compare-fail=min:99999")
    assert (failed.ret, passed.ret) == (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.OK)
    assert any("Performance has regressed" in line for line in said(failed))
    assert not any("Traceback" in line for line in said(failed))
    failed.stdout.fnmatch_lines(["*2 passed*", f"2 of 2 cases are in {tmp_path / 'r.json'}"])
    assert len(saved(tmp_path)) == 2


def test_both_json_files_are_written_and_hold_the_same_times(forward, tmp_path):
    forward("--results", tmp_path / "r.json", "--benchmark-json", tmp_path / "b.json")
    ours, theirs = (
        {one["name"]: one["stats"]["data"] for one in json.loads(path.read_text())["benchmarks"]}
        for path in (tmp_path / "r.json", tmp_path / "b.json")
    )
    assert ours == theirs
    assert len(ours) == 2


def test_a_profile_of_the_host_is_shown_and_changes_no_time(forward, tmp_path):
    out = forward("--benchmark-cprofile=tottime", "--results", tmp_path / "r.json")
    out.stdout.fnmatch_lines(["*cProfile (time in s)*"])
    assert out.ret == 0
    entries = json.loads((tmp_path / "r.json").read_text())["benchmarks"]
    assert [len(entry["stats"]["data"]) for entry in entries] == [5, 5]


def test_a_histogram_without_pygal_is_refused_before_measuring(forward, tmp_path, monkeypatch):
    find = saved_runs.importlib.util.find_spec
    monkeypatch.setattr(
        saved_runs.importlib.util,
        "find_spec",
        lambda name, *args: None if name == "pygal" else find(name, *args),
    )
    out = forward(f"--benchmark-histogram={tmp_path}/h", "--results", tmp_path / "r.json")
    assert out.ret == pytest.ExitCode.USAGE_ERROR
    assert any("pip install 'pytest-benchmark[histogram]'" in line for line in said(out))


def test_a_histogram_is_drawn(forward, tmp_path):
    pytest.importorskip("pygal")
    assert forward(f"--benchmark-histogram={tmp_path}/h").ret == 0
    assert list(tmp_path.glob("h*.svg"))


def test_saved_runs_lie_at_the_root_wherever_a_run_is_started(pytester, monkeypatch):
    storages = []

    class Asks:
        def pytest_sessionfinish(self, session):
            saved = session.config.pluginmanager.get_plugin("pytest-benchmark")
            storages.append(str(saved.storage))

    monkeypatch.chdir(ROOT / "bench")
    file = ROOT / "bench" / "bench_linear.py"
    pytester.inline_run("--co", "-q", "-p", "no:cacheprovider", file, plugins=[Asks()])
    assert storages == [str(ROOT / ".benchmarks")]


@pytest.mark.parametrize(("folder", "option"), [(".", []), ("bench", ["--storage=../.benchmarks"])])
def test_the_command_of_pytest_benchmark_finds_saved_runs(forward, tmp_path, folder, option):
    forward("--benchmark-save=first")
    checkout = tmp_path / "checkout"
    (checkout / "bench").mkdir(parents=True)
    (tmp_path / "saved").rename(checkout / ".benchmarks")
    program = Path(sys.executable).with_name("pytest-benchmark")
    ended = subprocess.run(
        [program, *option, "compare", "0001"], cwd=checkout / folder, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "dense_tp_row-N64-B8-bf16" in ended.stdout


def test_workers_refuse_benchmarks_at_once_and_say_what_to_do(forward):
    out = forward("-n2")
    assert out.ret == pytest.ExitCode.USAGE_ERROR
    assert any("Leave -n out; or add --benchmark-disable" in line for line in said(out))


@pytest.mark.usefixtures("shared_ranks")  # a worker has its own
@pytest.mark.parametrize(
    "workers",
    [(), pytest.param(("-n1", "--ranks=1"), marks=pytest.mark.slow)],
    ids=["here", "worker"],
)
def test_disabled_benchmarks_run_each_case_once_checked_and_untimed(forward, tmp_path, workers):
    out = forward("--benchmark-disable", *workers, "--results", tmp_path / "r.json")
    out.assert_outcomes(passed=2)
    out.stdout.fnmatch_lines(["benchmark: disabled; each case runs once and is checked, not timed"])
    out.stdout.fnmatch_lines(["*dense_tp_row-N64-B8-bf16]  right; not timed*"])
    assert not (tmp_path / "r.json").exists()


@pytest.mark.usefixtures("shared_ranks")
def test_a_disabled_benchmark_that_is_wrong_fails(bench, tmp_path):
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "x.npy", numpy.full((8, 64), numpy.nan, dtype=numpy.float32))
    out = bench(
        *SMALL, "--benchmark-disable", "--set", f"input=file:{tmp_path}/x.npy",
        files=["bench/bench_linear.py::bench_forward"],
    )  # fmt: skip
    out.assert_outcomes(failed=2)
