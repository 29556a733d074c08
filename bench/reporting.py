"""How a run tells where it stands: a line a case, and what a case that takes long waits for."""

import contextlib
import time
from collections import Counter

import pytest

from bench.saving import say


class Progress:
    """One line a case: how far, which case, its time or why there is none, and what is left."""

    def __init__(self, config):
        self.config, self.done, self.total, self.began = config, 0, 0, time.monotonic()
        self.waiting = Counter()  # cases not yet told, by point
        self.measured = set()  # points

    def tell(self, text: str) -> None:
        """Prints a line from inside a test, around what captures its output."""
        capture = self.config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            say(self.config, text)

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
            report.bench_result, report.bench_point = "FAILED", _point(item)
            fixture = item.funcargs.get("benchmark")
            if report.skipped:
                reason = report.longrepr[2].removeprefix("Skipped: ")
                report.bench_result = f"skipped: {reason}"
            elif report.when == "call" and report.passed and fixture is not None:
                stats = fixture.stats and fixture.stats.stats
                shown = f"{stats.median * 1e3:.4g} ms" if stats else "right; not timed"
                remark = fixture.extra_info.get("remark")
                report.bench_result = f"{shown}, {remark}" if remark else shown
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
        of = f"/{self.total}" if self.total else ""  # workers of xdist know, this process does not
        left = f"  ({self._left()})" if self.total else ""
        reporter.write_line(f"[{self.done}{of}] {name}  {report.bench_result}{left}")

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
