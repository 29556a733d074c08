"""How a run tells where it stands, and how its results reach the disk: whole or not at all."""

import json
import os
import platform
import time
from collections import Counter
from pathlib import Path

import pytest
import pytest_benchmark


class Progress:
    """One line a case: how far, which case, its time or why there is none, and what is left."""

    def __init__(self, config):
        self.config, self.done, self.total, self.began = config, 0, 0, time.monotonic()
        self.waiting = Counter()  # cases not yet told, by point
        self.measured = set()  # points

    def pytest_collection_finish(self, session):
        items = [item for item in session.items if "record" in item.fixturenames]
        self.total, self.waiting = len(items), Counter(_point(item) for item in items)
        self.began = time.monotonic()
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if self.total and reporter is not None:
            reporter.showfspath = False  # a line a case, without one for its file before it
            reporter._show_progress_info = False  # nor the share of letters that were not printed

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        result = yield
        if fixturedef.argname == "laboratory":
            self.began = time.monotonic()  # what starting took, it takes once
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if "record" in getattr(item, "fixturenames", ()):
            report.bench_result, report.bench_point = None, _point(item)
            fixture = item.funcargs.get("benchmark")
            if report.when == "call" and report.passed and fixture is not None and fixture.stats:
                report.bench_result = fixture.stats.stats.median
        return report

    def pytest_report_teststatus(self, report):
        if hasattr(report, "bench_result") and not (report.when == "teardown" and report.passed):
            category = "" if report.passed and report.when == "setup" else report.outcome
            # No letter: the line below says it. The word stands in the summary at the end.
            return category, "", "" if report.passed else report.outcome.upper()
        return None

    def pytest_runtest_logreport(self, report):
        final = report.when == "call" or (report.when == "setup" and not report.passed)
        if not hasattr(report, "bench_result") or not final:
            return
        self.done += 1
        self.waiting[report.bench_point] -= 1
        if not report.skipped:
            self.measured.add(report.bench_point)
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None:
            return
        name = report.nodeid.rpartition("/")[2].partition("::")[2]
        reporter.ensure_newline()
        reporter.write_line(f"[{self.done}/{self.total}] {name}  {_what(report)}  ({self._left()})")

    def _left(self) -> str:
        """The cases of a point are measured together, before the first of them is told."""
        left = self.total - self.done
        if not left:
            return "done"
        if not self.measured:
            return f"{left} left"
        points = sum(n > 0 and p not in self.measured for p, n in self.waiting.items())
        seconds = (time.monotonic() - self.began) / len(self.measured) * points
        shown = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        return f"{left} left, about {shown}"


def _point(item) -> str:
    return item.get_closest_marker("benchmark").kwargs["group"]


def _what(report) -> str:
    if report.bench_result is not None:
        return f"{report.bench_result * 1e3:.4g} ms"
    if report.skipped:
        return f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"
    return "FAILED"


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


class SafeResults:
    """`--results FILE`: pytest-benchmark writes beside the file, which is replaced at the end."""

    def __init__(self, config):
        self.target = self.partial = None
        self.interrupted = False
        if not config.option.results or hasattr(config, "workerinput"):
            return
        self.target = Path(config.option.results)
        begin = f".{self.target.name}.{platform.node()}."
        self.partial = self.target.with_name(f"{begin}{os.getpid()}.partial")
        if self.target.exists() and not self.target.is_file():
            raise pytest.UsageError(f"--results {self.target} is no file; name one, such as r.json")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(self.target.parent, begin)
            handle = self.partial.open("wb")
        except OSError as error:
            raise pytest.UsageError(f"--results {self.target} cannot be written: {error}") from None
        # Up to 5.2 pytest-benchmark takes an open file, from 5.3 on a path.
        if tuple(map(int, pytest_benchmark.__version__.split(".")[:2])) < (5, 3):
            config.option.benchmark_json = handle
        else:
            handle.close()
            config.option.benchmark_json = str(self.partial)

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self):
        # Not told by the exit status where pytest fails to report the interrupt.
        self.interrupted = True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session):
        if self.target is None:
            return (yield)
        try:
            result = yield
            self._keep(session)
        except OSError as error:
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
            self._say(
                session,
                f"the results could not be saved to {self.target}: {error}. "
                f"{'What was there before is untouched. ' if self.target.exists() else ''}"
                "Free space, or choose another --results, and run again.",
            )
            return None
        except KeyboardInterrupt:
            self._say(session, f"interrupted while it ended: {self._unwritten()}")
            raise
        finally:
            self.partial.unlink(missing_ok=True)
        return result

    def _keep(self, session) -> None:
        if not self.partial.stat().st_size:
            if not session.config.option.collectonly:
                how = "interrupted before a" if self.interrupted else "no"
                self._say(session, f"{how} case was measured: {self._unwritten()}")
            return
        target = self.target
        if not self.interrupted:
            self.partial.replace(target)
            return
        stays = f"; {target} stays as it was" if target.exists() else ""
        if stays:
            names = (target.with_suffix(f".partial{n}.json") for n in ("", *range(2, 10**6)))
            target = next(name for name in names if not name.exists())
        measured = len(json.loads(self.partial.read_bytes())["benchmarks"])
        self.partial.replace(target)
        cases = sum("record" in item.fixturenames for item in session.items)
        self._say(session, f"interrupted: {measured} of {cases} cases are in {target}{stays}")

    def _unwritten(self) -> str:
        stays = "; what was there before is untouched" if self.target.exists() else ""
        return f"{self.target} was not written{stays}"

    def _say(self, session, text: str) -> None:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(text, red=True)
