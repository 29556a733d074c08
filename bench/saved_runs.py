"""pytest-benchmark's own options in this project: where it saves, with what it compares.

Saved runs lie in .benchmarks at the root of the checkout, wherever pytest was started, which is
where `pytest-benchmark compare` looks when it is called in the root.
"""

import importlib.util

import pytest
from pytest_benchmark.logger import Logger
from pytest_benchmark.session import PerformanceRegression
from pytest_benchmark.storage.file import FileStorage
from pytest_benchmark.utils import get_machine_id, load_storage

from bench import options

LATEST = "[0-9][0-9][0-9][0-9]_"  # what --benchmark-compare without a number chooses from
VOLATILE = ("ceilings", "problem")  # of machine_info: measured anew by each run
# What a rank of torchrun writes; all but the first leave it out.
WRITERS = (
    *("results", "xmlpath", "log_file", "report_log", "htmlpath"),
    *("benchmark_json", "benchmark_save", "benchmark_autosave"),
    *("benchmark_compare", "benchmark_compare_fail", "benchmark_histogram"),
    *("benchmark_cprofile", "benchmark_cprofile_dump"),
)


class SavedRuns:
    """Checks pytest-benchmark's options before the run, and keeps its warnings short."""

    def __init__(self, config):
        self.config, self.first_to_save = config, False
        option = config.option
        if option.benchmark_storage == "file://./.benchmarks":  # the default
            option.benchmark_storage = f"file://{config.rootpath / '.benchmarks'}"
        _check_workers(config)
        if option.benchmark_histogram and importlib.util.find_spec("pygal") is None:
            raise pytest.UsageError(
                "--benchmark-histogram draws with pygal, which is not installed: "
                "pip install 'pytest-benchmark[histogram]', or leave the option out"
            )
        self._check_compare(option)
        if not options.first_rank():
            for name in WRITERS:
                if getattr(option, name, None):
                    setattr(option, name, None)
            option.verbose, option.benchmark_quiet = -2, True

    def _check_compare(self, option) -> None:
        wanted = option.benchmark_compare
        if not wanted:
            if option.benchmark_compare_fail:
                raise pytest.UsageError(
                    "--benchmark-compare-fail needs a saved run to compare with: add "
                    "--benchmark-compare (the latest) or --benchmark-compare=NUMBER"
                )
            return
        storage = load_storage(
            option.benchmark_storage,
            logger=Logger(Logger.QUIET),
            default_machine_id=get_machine_id(),
            netrc=option.benchmark_netrc,
        )
        if not isinstance(storage, FileStorage):  # a server, which is asked when it is needed
            return
        try:
            found = storage.query(LATEST if wanted is True else wanted)
        except ValueError:  # a path of several folders
            found = []
        if not found and (wanted is not True or option.benchmark_compare_fail):
            saved = ", ".join(file.stem[:24] for file in storage.query(LATEST)) or "none"
            shown = "--benchmark-compare" + ("" if wanted is True else f"={wanted}")
            raise pytest.UsageError(
                f"{shown}: there is no such saved run in {storage}; saved are: {saved}. "
                "--benchmark-autosave saves one. (A path of tests stands before this option.)"
            )
        self.first_to_save = not found

    def pytest_report_header(self):
        lines = []
        if self.first_to_save:
            lines.append("benchmark: no run is saved yet, so there is nothing to compare with")
        if self.config.option.benchmark_disable:
            lines.append("benchmark: disabled; each case runs once and is checked, not timed")
        if self.config.option.benchmark_cprofile:
            lines.append("benchmark: cProfile sees this process only; --profile shows the ranks")
        return lines

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_compare_machine_info(
        self, benchmarksession, machine_info, compared_benchmark
    ):
        differs = differences(compared_benchmark["machine_info"], machine_info)
        if differs:
            text = f"The saved run was measured elsewhere or otherwise: {', '.join(differs)}"
            benchmarksession.logger.info(text, newline=False)
        # pytest-benchmark would warn with both machines in full, kilobytes, at any difference; and
        # measured ceilings always differ. What matters has just been said.
        compared_benchmark["machine_info"] = machine_info

    @pytest.hookimpl(wrapper=True)
    def pytest_terminal_summary(self, terminalreporter):
        try:
            return (yield)
        except PerformanceRegression:  # pytest-benchmark has listed the cases
            session = terminalreporter._session
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
            return None


def differences(before: dict, after: dict) -> list[str]:
    """What differs between two machine_infos and may matter, as "torch 2.11 -> 2.13"."""
    old, new = before.get("blockshock") or {}, after.get("blockshock") or {}
    lines = []
    for key in dict.fromkeys((*new, *old)):
        if key not in VOLATILE and old.get(key) != new.get(key):
            text = f"{old.get(key)} -> {new.get(key)}"
            lines.append(f"{key} {text}" if len(text) < 80 else f"another {key}")
    return lines


def _check_workers(config) -> None:
    """Benchmarks under pytest-xdist: refused before any worker has started."""
    option, bench = config.option, config.rootpath / "bench"
    if getattr(option, "dist", "no") == "no" or option.benchmark_disable:
        return
    if hasattr(config, "workerinput"):
        return
    for arg in config.args:
        path = (config.invocation_params.dir / arg.partition("::")[0]).resolve()
        if path.is_relative_to(bench) or bench.is_relative_to(path):
            raise pytest.UsageError(
                f"{arg} with -n: times of cases that run side by side are no times. Leave -n out; "
                "or add --benchmark-disable, which runs each case once, checked and untimed"
            )
