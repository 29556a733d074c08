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
    *(*SMALL, "bench/bench_forward.py"),
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
        return bench(*SMALL, *results, *args, files=["bench/bench_forward.py"], **options)

    return run


def measured(path):
    return len(json.loads(path.read_text())["benchmarks"])


class Raises:
    """A plugin that fails as the session ends, before or after the others."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self):
        raise PermissionError("a read-only checkout")


@pytest.mark.parametrize(
    "args",
    [
        ("--junitxml=/proc/nowhere/j.xml",),
        ("--benchmark-json=/proc/nowhere/b.json",),
        ("-p", "tests.test_endings_plugin"),
    ],
)
def test_what_raises_as_the_session_ends_loses_no_result(forward, tmp_path, monkeypatch, args):
    monkeypatch.setitem(sys.modules, "tests.test_endings_plugin", Raises())
    with contextlib.suppress(OSError):  # pytest raises it, in a process of its own
        forward(*args)
    assert measured(tmp_path / "r.json") == 2
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["r.json"]


def test_a_cache_that_cannot_be_written_is_no_error(forward, tmp_path):
    (tmp_path / "file").touch()
    out = forward("-p", "cacheprovider", "-o", f"cache_dir={tmp_path}/file/cache")
    assert out.ret == 0
    assert measured(tmp_path / "r.json") == 2
    out.stdout.fnmatch_lines([f"2 of 2 cases are in {tmp_path / 'r.json'}"])


def test_a_reader_that_goes_ends_no_run(tmp_path):
    command = subprocess.Popen(
        [*PROGRAM, "--results", tmp_path / "r.json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    command.stdout.readline()
    command.stdout.close()  # as `head -1` does
    stderr = command.stderr.read()
    assert command.wait(timeout=120) == 0, stderr
    assert f"2 of 2 cases are in {tmp_path / 'r.json'}" in stderr
    assert "Traceback" not in stderr
    assert measured(tmp_path / "r.json") == 2


SLOW = """
import time
from blockshock.phases.session import Laboratory

measure = Laboratory.result

def result(self, case, neighbours):
    if case.method == "dense_tp_row":
        self.ranks.run(time.sleep, 600, timeout=900)  # in the ranks, as a case that takes long
    return measure(self, case, [case])

Laboratory.result = result
"""


def test_sigterm_keeps_what_was_measured_and_leaves_no_process_and_no_file(tmp_path):
    (tmp_path / "slow_case.py").write_text(SLOW)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = subprocess.Popen(
        [*PROGRAM, "-p", "slow_case", "--results", tmp_path / "r.json"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )  # fmt: skip
    lines = []
    while not any(line.startswith("[1/2]") for line in lines):
        lines.append(command.stdout.readline())
        assert lines[-1], lines
    time.sleep(1)  # until the ranks sleep
    began = time.monotonic()
    os.kill(command.pid, signal.SIGTERM)
    lines += command.stdout.read().splitlines()  # ends with the last process that holds it
    assert command.wait() == 128 + signal.SIGTERM
    assert time.monotonic() - began < 30
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
