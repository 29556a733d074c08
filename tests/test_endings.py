"""Whatever ends a run, what it measured is in the file of --results, and a line says so."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import reporting
from blockshock.phases import session

ROOT = Path(__file__).parents[1]
SMALL = ("--set", "N=64", "--set", "B=8", "--set", "method=dense_single,dense_tp_row")
PROGRAM = [
    *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device=cpu", "--rounds=6"),
    *(*SMALL, "bench/bench_linear.py::bench_forward"),
]


@pytest.fixture
def forward(bench, tmp_path, monkeypatch):
    """Runs two forward cases with made-up times for tmp_path/r.json."""

    def result(self, case, neighbours):
        return [1e-3] * 5, {"schema": 1, "id": case.id}

    monkeypatch.setattr(session.Laboratory, "ceilings", lambda self: {})
    monkeypatch.setattr(session.Laboratory, "result", result)

    def run(*args, **options):
        results = ("--results", tmp_path / "r.json")
        return bench(
            *SMALL, *results, *args, files=["bench/bench_linear.py::bench_forward"], **options
        )

    return run


def measured(path):
    return len(json.loads(path.read_text())["benchmarks"])


RAISES = """
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish():
    raise PermissionError("a read-only checkout")
"""


@pytest.mark.parametrize(
    "args",
    [
        ("--junitxml=/proc/nowhere/j.xml",),
        ("--benchmark-json=/proc/nowhere/b.json",),
        ("-p", "raises_at_the_end"),
    ],
)
def test_what_raises_as_the_session_ends_loses_no_result(forward, tmp_path, monkeypatch, args):
    (tmp_path / "raises_at_the_end.py").write_text(RAISES)
    monkeypatch.syspath_prepend(tmp_path)
    out = forward(*args)
    assert out.ret == pytest.ExitCode.INTERNAL_ERROR
    assert any("nowhere" in line or "read-only" in line for line in out.errlines)
    out.stdout.fnmatch_lines([f"2 of 2 cases are in {tmp_path / 'r.json'}"])
    assert measured(tmp_path / "r.json") == 2
    assert not list(tmp_path.glob(".*.partial"))


def test_a_cache_that_cannot_be_written_is_no_error(forward, tmp_path):
    (tmp_path / "file").touch()
    out = forward(cache=("-o", f"cache_dir={tmp_path}/file/cache"))
    assert out.ret == 0
    assert measured(tmp_path / "r.json") == 2
    out.stdout.fnmatch_lines([f"2 of 2 cases are in {tmp_path / 'r.json'}"])


# A plugin: times are made up at once, and one method's after its ranks have slept.
QUICK = """
import time
from blockshock.phases.session import Laboratory

def result(self, case, neighbours):
    if case.method == "{slow}":
        self.ranks.run(time.sleep, 600, timeout=900)
    return [1e-3] * 5, dict(schema=1, id=case.id)

Laboratory.ceilings, Laboratory.result = (lambda self: {{}}), result
"""


@pytest.fixture
def start(tmp_path):
    """Starts two forward cases as a program; `slow` names the method that takes long."""

    def start(slow, **environ):
        (tmp_path / "quick_cases.py").write_text(QUICK.format(slow=slow))
        return subprocess.Popen(
            [*PROGRAM, "-p", "quick_cases", "--results", tmp_path / "r.json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        )  # fmt: skip

    return start


@pytest.mark.slow
def test_a_reader_that_goes_ends_no_run(start, tmp_path):
    with start("none") as command:
        command.stdout.close()  # as `head` does; before the first line, so that the run meets it
        stderr = command.stderr.read()
    assert command.returncode == 0, stderr
    assert f"stdout was closed; the run goes on, for {tmp_path / 'r.json'}" in stderr
    assert f"2 of 2 cases are in {tmp_path / 'r.json'}" in stderr
    assert "Traceback" not in stderr
    assert measured(tmp_path / "r.json") == 2


@pytest.mark.slow
def test_ctrl_c_twice_keeps_what_was_measured_and_shows_no_traceback(start, tmp_path):
    with start("dense_tp_row") as command:
        while not command.stdout.readline().startswith("[1/2]"):
            assert command.poll() is None
        time.sleep(1)
        for _ in range(2):
            os.kill(command.pid, signal.SIGINT)
            time.sleep(0.1)
        out, err = command.communicate()
    assert f"interrupted: 1 of 2 cases are in {tmp_path / 'r.json'}" in out
    assert "Traceback" not in out + err
    assert command.returncode == pytest.ExitCode.INTERRUPTED
    assert measured(tmp_path / "r.json") == 1


def test_sigterm_keeps_what_was_measured_and_leaves_no_process_and_no_file(start, tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with start("dense_tp_row", TMPDIR=str(temporary)) as command:
        lines = []
        while not any(line.startswith("[1/2]") for line in lines):
            lines.append(command.stdout.readline())
            assert lines[-1], lines
        while not list(temporary.glob("blockshock-ranks-*/note-1")):
            time.sleep(0.1)
        time.sleep(1)
        os.kill(command.pid, signal.SIGTERM)
        lines += command.stdout.read().splitlines()  # ends with the last process that holds it
    assert command.returncode == 128 + signal.SIGTERM
    assert f"ended early: 1 of 2 cases are in {tmp_path / 'r.json'}" in lines
    assert measured(tmp_path / "r.json") == 1
    assert not [path.name for path in temporary.iterdir() if "torchinductor" not in path.name]


def test_a_line_of_progress_is_shown_around_what_captures_output():
    shown, state = [], []

    @contextlib.contextmanager
    def shows():
        state.append("shown")
        yield
        state.pop()

    plugins = {
        "capturemanager": SimpleNamespace(global_and_fixture_disabled=shows),
        "terminalreporter": SimpleNamespace(
            ensure_newline=lambda: None,
            write_line=lambda text, bold: shown.append((text, *state)),
            flush=lambda: None,
            _tw=SimpleNamespace(_file=None),
        ),
    }
    config = SimpleNamespace(pluginmanager=SimpleNamespace(get_plugin=plugins.get))
    reporting.Progress(config).tell("still waiting")
    assert shown == [("still waiting", "shown")]
