"""`--results FILE`: what was measured reaches the disk, whole, however the run ends.

The file is written as the first thing when the session ends, before any plugin can raise there
(a read-only checkout, an unwritable --junitxml, a failed comparison), and apart from
pytest-benchmark's own files. The last line of the run says where it is.
"""

import contextlib
import os
import platform
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from pytest_benchmark.utils import safe_dumps


class SafeResults:
    """Writes what was measured beside `--results`, then renames it; says where it is, or why not.

    A run that was cut short never replaces an earlier result: its cases go to r.partial.json. Nor
    is what another run wrote meanwhile replaced: the cases go to r.2.json. What the disk does not
    take goes to the folder of temporary files.
    """

    def __init__(self, config):
        self.target = self.partial = None
        self.cut_short = ""  # by what
        self.told = ""  # the last line of the run
        self.on_interrupt = None  # what SIGINT does, while it is ignored
        self.stream: Unbroken | None = None
        self.empty: list[str] = []  # benchmark files of which the sweep has no case
        if config.option.results is None or hasattr(config, "workerinput"):
            return
        if not config.option.results:
            raise pytest.UsageError("--results '' names no file; name one, such as r.json")
        self.target = Path(config.option.results)
        self.before = _version(self.target)
        begin = f".{self.target.name}.{platform.node()}."
        self.partial = self.target.with_name(f"{begin}{os.getpid()}.partial")
        if self.target.exists() and not self.target.is_file():
            raise pytest.UsageError(f"--results {self.target} is no file; name one, such as r.json")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(self.target.parent, begin)
            self.partial.touch()  # what cannot be written is better known now
            config.add_cleanup(lambda: self.partial.unlink(missing_ok=True))
        except OSError as error:
            raise pytest.UsageError(f"--results {self.target} cannot be written: {error}") from None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session):
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if self.target and reporter is not None:
            reporter._tw._file = self.stream = Unbroken(reporter._tw._file, self.target)

    def pytest_collectreport(self, report):
        name = report.nodeid.rpartition("/")[2]
        if report.passed and not report.result and name.startswith("bench_"):
            self.empty.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo):
        # Noted here, because pytest itself may fail to report the interrupt.
        self.cut_short = (
            "interrupted" if excinfo.errisinstance(KeyboardInterrupt) else "ended early"
        )
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C twice, until the results are kept. What takes longer then, it ends again.
            self.on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session):
        if session.exitstatus == pytest.ExitCode.INTERNAL_ERROR:
            self.cut_short = self.cut_short or "ended early"
        try:
            self.told = self._keep(session)
            if self.on_interrupt:
                signal.signal(signal.SIGINT, self.on_interrupt)
            return (yield)
        except KeyboardInterrupt:
            if self.target and not self.told:
                self.told = f"interrupted while it ended: {self._unwritten()}"
            raise
        finally:
            if self.told:
                say(session.config, self.told)
            if self.stream:
                self.stream.close_for_good()

    def _keep(self, session) -> str:
        """Writes the results; the line that tells about it."""
        config = session.config
        plugin = config.pluginmanager.get_plugin("pytest-benchmark")
        measured = plugin.benchmarks if plugin else []
        measured = [one for one in measured if one.stats.data and not one.has_error]
        if not measured:
            return self._why_nothing(session)
        if not self.target:
            return ""
        total = sum("record" in item.fixturenames for item in session.items)
        content = _as_json(config, plugin, measured)
        try:
            self.partial.write_bytes(content)
            place, stays = self._place()
            self.partial.replace(place)
        except OSError as error:
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
            return (
                f"the results could not be saved to {self.target}: {error}. "
                f"{'What was there before is untouched. ' if self.target.exists() else ''}"
                f"{self._kept_elsewhere(content)}"
            )
        why = f"{self.cut_short}: " if self.cut_short else ""
        return f"{why}{len(measured)} of {total} cases are in {place}{stays}"

    def _place(self) -> tuple[Path, str]:
        """Where the results belong, and what to say about others that stay."""
        if not self.target.exists():
            return self.target, ""
        if self.cut_short:
            names, stays = ("partial", *(f"partial{n}" for n in range(2, 10**6))), "stays as it was"
        elif _version(self.target) != self.before:
            names, stays = range(2, 10**6), "is of another run, which ended before this one"
        else:
            return self.target, ""
        files = (self.target.with_suffix(f".{name}.json") for name in names)
        return next(file for file in files if not file.exists()), f"; {self.target} {stays}"

    def _kept_elsewhere(self, content: bytes) -> str:
        """Saves in the folder of temporary files what --results does not take; says where."""
        self.partial.unlink(missing_ok=True)
        name = None
        try:
            handle, name = tempfile.mkstemp(prefix=f"{self.target.stem}.", suffix=".json")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
        except OSError:
            if name:
                Path(name).unlink()
            return "Free space, or choose another --results, and run again."
        return f"They are in {name}: move them to a place that keeps them."

    def _why_nothing(self, session) -> str:
        """Why no case was measured, where one could have been expected."""
        option = session.config.option
        cases = [item for item in session.items if "record" in item.fixturenames]
        if option.collectonly or not (self.target or (self.empty and not session.items)):
            return ""
        if self.cut_short:
            why = f"{self.cut_short} before a case was measured"
        elif option.benchmark_disable:
            why = "no case was measured: benchmarks are disabled"
        elif cases:
            why = "no case was measured: each was skipped or failed, as told above"
        elif self.empty:
            why = (
                f"no case was measured: the sweep {option.sweep} has none of "
                f"{', '.join(self.empty)}; choose another with --sweep"
            )
        else:
            why = "no case was measured: none was selected"
        return f"{why}; {self._unwritten()}" if self.target else why

    def _unwritten(self) -> str:
        stays = "; what was there before is untouched" if self.target.exists() else ""
        return f"{self.target} was not written{stays}"


class Unbroken:
    """The terminal's stream, whose reader may go (`| head`): then the run goes on without it."""

    def __init__(self, stream, target: Path):
        self._stream, self._target, self.gone = stream, target, False

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def close_for_good(self) -> None:
        """Where the reader has gone: empties the buffer, so that the last flush has no error."""
        self.flush()
        if self.gone:  # pytest gives this descriptor its old meaning when capturing ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._stream.flush()

    def _try(self, call, *args) -> None:
        if self.gone:
            return
        try:
            call(*args)
        except BrokenPipeError:
            self.gone = True
            to_stderr(f"stdout was closed; the run goes on, for {self._target}")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def say(config, text: str) -> None:
    """Prints a line; on stderr where stdout was closed."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    try:
        reporter.ensure_newline()
        reporter.write_line(text, bold=True)
        reporter.flush()
    except OSError:
        to_stderr(text)
    if getattr(reporter._tw._file, "gone", False):
        to_stderr(text)


def to_stderr(text: str) -> None:
    with contextlib.suppress(OSError):  # it may be the same pipe
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def end_in_order_on_sigterm(config) -> None:
    """Makes SIGTERM end the run as Ctrl-C does: results are kept, ranks and their files removed."""
    if threading.current_thread() is not threading.main_thread() or hasattr(config, "workerinput"):
        return

    def end(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it more than once
        raise pytest.exit.Exception("ended by SIGTERM", returncode=128 + number)

    before = signal.signal(signal.SIGTERM, end)
    config.add_cleanup(lambda: signal.signal(signal.SIGTERM, before))


def _as_json(config, plugin, measured) -> bytes:
    """As pytest-benchmark writes it for --benchmark-json."""
    hook, machine = config.hook, plugin.get_machine_info()
    commit = hook.pytest_benchmark_generate_commit_info(config=config)
    hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit)
    content = hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=measured,
        include_data=True,
        machine_info=machine,
        commit_info=commit,
    )
    hook.pytest_benchmark_update_json(config=config, benchmarks=measured, output_json=content)
    return safe_dumps(content, ensure_ascii=True, indent=4).encode()


def _version(file: Path) -> tuple[int, int] | None:
    """What changes when the file is written anew; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _remove_stale(folder: Path, begin: str) -> None:
    """Removes what a run left that was killed: `begin`PID.partial of no process of this host."""
    for file in folder.iterdir():
        pid = file.name.removeprefix(begin).removesuffix(".partial")
        if file.name == f"{begin}{pid}.partial" and pid.isdigit() and not _alive(int(pid)):
            file.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
