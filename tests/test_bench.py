"""A run of the benchmarks, as a user starts it: what it prints, saves, refuses and survives."""

import contextlib
import json
import os
import platform
import resource
import subprocess
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
from _pytest.terminal import TerminalReporter

from bench import reporting, saving
from blockshock.distributed import Ranks
from blockshock.phases import session

ROOT = Path(__file__).parents[1]
FORWARD = "bench/bench_linear.py::bench_forward"
ONE = ("--set", "N=64", "--set", "B=8", "--set", "method=dense_single")
SMALL = ("--set", "N=64", "--set", "B=8", "--set", "optimizer=sgd", "--set", "steps=3")


@pytest.fixture
def made_up(monkeypatch):
    """Times are made up at once: for tests of what becomes of the results."""

    def result(self, case, neighbours):
        return [1e-3] * 5, {"schema": session.SCHEMA, "id": case.id}

    monkeypatch.setattr(session.Laboratory, "ceilings", lambda self: {})
    monkeypatch.setattr(session.Laboratory, "result", result)


def results(path):
    saved = json.loads(Path(path).read_text())
    return saved, {b["name"]: b for b in saved["benchmarks"]}


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ranks")
def test_every_method_and_phase_is_measured_recorded_and_named(bench, tmp_path):
    out = bench(*SMALL, "--results", tmp_path / "r.json")
    out.assert_outcomes(passed=38)
    saved, by_name = results(tmp_path / "r.json")
    assert "bench_forward[block_shock-N64-B8-bf16]" in by_name
    assert "bench_training[block_shock-packed_master-N64-B8-bf16-sgd]" in by_name
    out.stdout.fnmatch_lines(["[[]1/38] bench_correctness*N64-B8-bf16*ms  (37 left, about*)"])
    out.stdout.fnmatch_lines(["[[]38/38]*(done)"])
    assert out.outlines[-1] == f"38 of 38 cases are in {tmp_path / 'r.json'}"
    facts = saved["machine_info"]["blockshock"]
    assert facts["device"] == "CPU (2 gloo ranks)"
    assert facts["ceilings"]["matrix_flops"]["bf16"] > 0
    for entry in saved["benchmarks"]:
        info = entry["extra_info"]
        assert info["schema"] == session.SCHEMA
        assert info["timing"]["interleaved_with"]
        assert "UNSERIALIZABLE" not in json.dumps(entry)
        assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) == 5
        assert "ReplayClock" in str(entry["options"]["timer"])


@pytest.mark.usefixtures("shared_ranks")
def test_the_recorded_times_are_the_measured_ones_to_the_last_digit(bench, tmp_path, monkeypatch):
    measured = {}
    original = session.Laboratory.result

    def watched(self, case, neighbours):
        samples, info = original(self, case, neighbours)
        measured[case.id] = list(samples)
        return samples, info

    monkeypatch.setattr(session.Laboratory, "result", watched)
    bench(*SMALL, "--results", tmp_path / "r.json", files=[FORWARD])
    saved, _ = results(tmp_path / "r.json")
    assert len(measured) == 6
    for entry in saved["benchmarks"]:
        assert entry["stats"]["data"] == measured[entry["extra_info"]["id"]]


@pytest.mark.usefixtures("shared_ranks")
def test_what_cannot_run_is_skipped_with_the_reason(bench):
    out = bench("--set", "N=100", "--set", "B=8", files=[FORWARD])
    out.assert_outcomes(passed=5, skipped=1)
    out.stdout.fnmatch_lines(["*block_shock-N100*skipped: K = 100 is not a multiple of 64*"])
    assert not any("%]" in line for line in out.outlines)
    out.stdout.fnmatch_lines(["SKIPPED [[]1]*K = 100 is not a multiple of 64*"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "n=4096"], "*unknown key 'n'; known: B, K, N,*"),
        (["--set", "N"], "*'N' is not KEY=VALUE*"),
        (["--set", "method=blockshock"], "*unknown method 'blockshock'; known: dense_single*"),
        (["--set", "N=0"], "*N = 0 must be a whole number*"),
        (["--set", "dtype=float8"], "*unknown dtype 'float8'; use one of bf16, fp16, fp32*"),
        (["--sweep", "huge"], "*no sweep 'huge' of linear; known: *quick*"),
        (["--set", "mask=0110"], "*unknown mask '0110'; known: 1001, 1010, 1100, all,*"),
        (["--set", "policy=packed"], "*unknown policy 'packed'; known: all, dense_master*"),
        (["--set", "N=64,64"], "*lists *dense_single-N64-B16-bf16 twice*"),
        (["--rounds", "0"], "*--rounds 0: at least one*"),
        (["--timing", "graph"], "*--timing graph on cpu; valid there: host*"),
        (["--l2", "cold"], "*--l2 cold on cpu: only a GPU's L2 can be emptied*"),
        (["--l2", "hot"], "*--l2: invalid choice: 'hot'*"),
        (["--set", "N=["], "*--set 'N=[[]': a value is not a number, a name or text*"),
        (["--set", "bias=maybe"], "*bias = 'maybe' must be true or false*"),
        (["--set", "weight=nowhere.npy"], "*nowhere.npy: no such file; give the path*"),
        (["--set", "input=file:nowhere.safetensors:x"], "*nowhere.safetensors: no such file*"),
        (["--set", "input=mlp:activated=gelu"], "*'mlp:activated=gelu' does not take*activated*"),
        (["--set", "input=mlp:activation=["], "*'mlp:activation=[[]' is not KIND:OPTION=VALUE*"),
        (["--device=cuda", "--ranks=512"], "*--device cuda: 512 GPUs are needed*--device cpu*"),
        (["--profile", str(ROOT / "bench/bench_linear.py")], "*put --profile last*"),
        (["--profile", str(ROOT / "bench")], "*put --profile last, or write --profile=DIR*"),
        (["--results", "/dev/null"], "*/dev/null is no file*"),
        (["--results", ""], "*--results '' names no file; name one, such as r.json*"),
        (["--deadline", "0"], "*--deadline 0: a number of seconds above 0*"),
        (["--ranks", "0"], "*--ranks 0: at least one*"),
        (["--results", "/proc/nowhere/r.json"], "*cannot be written*"),
    ],
)
def test_a_wrong_option_is_one_clear_error(bench, args, message):
    out = bench(*args, files=[FORWARD])
    assert out.ret == pytest.ExitCode.USAGE_ERROR
    everything = [*out.outlines, *out.errlines]
    assert any(fnmatchcase(line, message) for line in everything), everything
    assert not any("Traceback" in line for line in everything)


def test_a_number_of_ranks_that_is_none_is_one_clear_error(bench, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "x")
    out = bench("--collect-only")
    assert out.ret == pytest.ExitCode.USAGE_ERROR
    out.stderr.fnmatch_lines(["*WORLD_SIZE=x in the environment is not a number: unset it*"])


def test_one_variable_of_torchrun_alone_makes_no_job_of_it(bench, tmp_path, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    out = bench(*ONE, "--results", tmp_path / "r.json", files=[FORWARD])
    out.stdout.fnmatch_lines(["[[]1/1]*(done)"])
    assert results(tmp_path / "r.json")[0]["machine_info"]["blockshock"]["ranks"] == 2


def test_a_file_of_another_shape_is_one_clear_error(bench, tmp_path):
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "w.npy", numpy.ones((64, 32), dtype=numpy.float32))
    weight = bench("--set", f"weight={tmp_path}/w.npy", "--set", "N=64")
    weight.stderr.fnmatch_lines(["*w.npy is (64, 32), the case has N = 64, K = 64; set N and K*"])
    data = bench("--set", f"input=file:{tmp_path}/w.npy", "--set", "N=32", "--set", "B=65")
    data.stderr.fnmatch_lines(["*w.npy has shape (64, 32), the case reads B = 65 rows of K = 32*"])
    assert (weight.ret, data.ret) == (pytest.ExitCode.USAGE_ERROR,) * 2
    fits = ("--set", f"input=file:{tmp_path}/w.npy", "--set", "N=32", "--set", "B=64")
    assert bench(*fits, "--collect-only", "-q").ret == 0


@pytest.mark.parametrize("sweep", ["quick", "n_sweep", "batch_sweep", "official", "ranks"])
def test_every_shipped_sweep_can_be_collected(bench, sweep):
    out = bench("--sweep", sweep, "--collect-only", "-q")
    assert out.ret == 0
    out.stdout.fnmatch_lines(["*bench_forward*", "* tests collected*"])


@pytest.fixture
def interrupted(bench, made_up, tmp_path, monkeypatch):
    """Runs six cases and presses Ctrl-C at one of them."""
    original, asked = session.Laboratory.result, []

    def run(at):
        def result(self, case, neighbours):
            asked.append(case)
            if len(asked) == at:
                raise KeyboardInterrupt
            return original(self, case, neighbours)

        monkeypatch.setattr(session.Laboratory, "result", result)
        args = ("--results", tmp_path / "r.json")
        return bench(*SMALL, *args, files=[FORWARD])

    return run


def files(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix)


def test_an_interrupt_leaves_a_complete_result_as_it_is(interrupted, tmp_path):
    target = tmp_path / "r.json"
    target.write_text("complete")
    out = interrupted(at=3)
    assert out.ret == pytest.ExitCode.INTERRUPTED
    assert target.read_text() == "complete"
    assert len(results(tmp_path / "r.partial.json")[1]) == 2
    assert files(tmp_path) == ["r.json", "r.partial.json"]
    out.stdout.fnmatch_lines(["interrupted: 2 of 6 cases are in *r.partial.json; *r.json stays*"])


def test_a_second_interrupt_leaves_what_the_first_one_left(interrupted, tmp_path):
    for name in ("r.json", "r.partial.json"):
        (tmp_path / name).write_text("earlier")
    interrupted(at=3)
    assert (tmp_path / "r.json").read_text() == (tmp_path / "r.partial.json").read_text()
    assert len(results(tmp_path / "r.partial2.json")[1]) == 2


def test_an_interrupt_that_pytest_fails_to_report_is_one_all_the_same(
    interrupted, tmp_path, monkeypatch
):
    def fails(self, excinfo):
        raise TypeError("a frame without a line number")

    monkeypatch.setattr(TerminalReporter, "pytest_keyboard_interrupt", fails)
    (tmp_path / "r.json").write_text("complete")
    out = interrupted(at=3)
    assert "a frame without a line number" in out.stderr.str()
    assert (tmp_path / "r.json").read_text() == "complete"
    assert len(results(tmp_path / "r.partial.json")[1]) == 2


def test_an_interrupt_says_what_is_in_the_file(interrupted, tmp_path):
    out = interrupted(at=4)
    assert out.ret == pytest.ExitCode.INTERRUPTED
    assert len(results(tmp_path / "r.json")[1]) == 3
    out.stdout.fnmatch_lines(["interrupted: 3 of 6 cases are in *r.json"])


@pytest.mark.parametrize("before", [None, "earlier"])
def test_an_interrupt_before_any_case_says_that_no_file_was_written(interrupted, tmp_path, before):
    if before:
        (tmp_path / "r.json").write_text(before)
    out = interrupted(at=1)
    untouched = "; what was there before is untouched" if before else ""
    line = f"interrupted before a case was measured; *r.json was not written{untouched}"
    out.stdout.fnmatch_lines([line])
    assert files(tmp_path) == (["r.json"] if before else [])


def test_a_second_interrupt_while_the_ranks_end_loses_nothing(bench, tmp_path, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Ranks, "close", interrupt)
    with contextlib.suppress(KeyboardInterrupt):  # of this process, where pytest has ended
        bench(*ONE, "--results", tmp_path / "r.json", files=[FORWARD])
    assert len(results(tmp_path / "r.json")[1]) == 1
    assert files(tmp_path) == ["r.json"]


@pytest.mark.usefixtures("shared_ranks")
@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--set", "N=100"), "each was skipped or failed, as told above"),
        (("-k", "nothing"), "none was selected"),
        (("--benchmark-disable",), "benchmarks are disabled"),
    ],
)
def test_a_run_that_measured_nothing_says_why_and_that_no_file_was_written(
    bench, tmp_path, args, why
):
    args = (*SMALL, "--set", "method=block_shock", *args, "--results", tmp_path / "r.json")
    out = bench(*args, files=[FORWARD])
    out.stdout.fnmatch_lines([f"no case was measured: {why}; *r.json was not written"])
    assert files(tmp_path) == []
    listed = bench(*args, "--collect-only", files=[FORWARD])
    assert not any("was measured" in line for line in listed.outlines)


@pytest.mark.usefixtures("shared_ranks")
def test_seeds_are_cases_of_their_own(bench, tmp_path):
    args = ("--set", "seed=0,1", "--set", "method=dense_single", "--results", tmp_path / "r.json")
    bench(*SMALL, *args, files=[FORWARD]).assert_outcomes(passed=2)
    _, by_name = results(tmp_path / "r.json")
    data = [entry["stats"]["data"] for entry in by_name.values()]
    assert set(by_name) == {
        "bench_forward[dense_single-N64-B8-bf16]",
        "bench_forward[dense_single-N64-B8-bf16-seed=1]",
    }
    assert data[0] != data[1]


def test_a_missing_gpu_fails_where_one_is_required(bench):
    out = bench(*SMALL, "--require-gpu", files=[FORWARD])
    out.assert_outcomes(failed=6)
    out.stdout.fnmatch_lines(["*--require-gpu: 2 GPUs are needed, found*"])
    out.stdout.fnmatch_lines(["FAILED *bench_linear.py::bench_forward[[]dense_single*"])


@pytest.mark.usefixtures("made_up")
def test_a_disk_that_is_full_loses_no_earlier_result_and_leaves_no_rest(bench, tmp_path):
    target = tmp_path / "results" / "r.json"
    target.parent.mkdir()
    target.write_text("earlier")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses longer files
    try:
        args = ("--results", target, "--set", "method=dense_single")
        out = bench(*SMALL, *args, files=[FORWARD])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.ret == pytest.ExitCode.INTERNAL_ERROR
    out.stdout.fnmatch_lines(["*could not be saved*File too large*untouched*"])
    assert target.read_text() == "earlier"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.usefixtures("made_up")
def test_what_the_disk_of_results_does_not_take_is_kept_elsewhere(bench, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        if path.suffix == ".partial":
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(saving.tempfile, "tempdir", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    args = ("--results", tmp_path / "r.json", "--set", "method=dense_single")
    out = bench(*SMALL, *args, files=[FORWARD])
    assert out.ret == pytest.ExitCode.INTERNAL_ERROR
    out.stdout.fnmatch_lines(
        ["*r.json: *No space left on device. They are in *other/r.*.json: move*"]
    )
    (file,) = (tmp_path / "other").glob("r.*.json")
    assert len(results(file)[1]) == 1
    assert files(tmp_path) == []


def test_a_result_that_another_run_wrote_meanwhile_stays(tmp_path):
    config = SimpleNamespace(
        option=SimpleNamespace(results=str(tmp_path / "r.json")), add_cleanup=lambda clean: None
    )
    first, second = saving.SafeResults(config), saving.SafeResults(config)
    assert first._place() == (tmp_path / "r.json", "")
    (tmp_path / "r.json").write_text("the first")
    place, words = second._place()
    assert place == tmp_path / "r.2.json"
    assert words == f"; {tmp_path / 'r.json'} is of another run, which ended before this one"
    assert saving.SafeResults(config)._place() == (tmp_path / "r.json", "")  # as asked


def test_the_time_that_is_left_counts_points_and_not_cases(monkeypatch):
    progress = reporting.Progress(None)
    progress.total, progress.began = 9, 100.0
    progress.waiting = Counter({"first": 3, "second": 3, "third": 3})
    progress.config = SimpleNamespace(pluginmanager=SimpleNamespace(get_plugin=lambda name: None))
    now = iter([110.0, 110.0, 110.0, 130.0])
    monkeypatch.setattr(reporting.time, "monotonic", lambda: next(now))

    def tell(point, skipped=False):
        report = SimpleNamespace(
            when="setup" if skipped else "call", passed=not skipped, skipped=skipped,
            bench_point=point, bench_result=None,
        )  # fmt: skip
        progress.pytest_runtest_logreport(report)
        return progress._left()

    assert tell("first", skipped=True) == "8 left"
    assert tell("first") == "7 left, about 20 s"
    assert tell("first") == "6 left, about 20 s"
    assert tell("second", skipped=True) == "5 left, about 20 s"
    assert tell("second") == "4 left, about 15 s"


def test_the_time_to_start_is_no_time_of_a_point():
    progress = reporting.Progress(None)
    for name, restarted in (("ranks", False), ("laboratory", True)):
        before, setup = progress.began, progress.pytest_fixture_setup(SimpleNamespace(argname=name))
        next(setup)
        with pytest.raises(StopIteration):
            setup.send("made")
        assert (progress.began > before) == restarted


def test_what_a_killed_run_left_is_removed_and_what_others_write_is_not(bench, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [
        f".r.json.{platform.node()}.{dead.pid}.partial",
        f".r.json.{platform.node()}.{os.getppid()}.partial",
        f".r.json.elsewhere.{dead.pid}.partial",
        f".s.json.{platform.node()}.{dead.pid}.partial",
    ]
    for name in names:
        (tmp_path / name).touch()
    bench("--results", tmp_path / "r.json", "--collect-only", "-q")
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".partial") == sorted(names[1:])
