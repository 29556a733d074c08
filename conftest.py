"""Options, markers and fixtures of the suite.

The fixture `ranks` runs functions in all ranks; `record` measures a case and hands its times to
pytest-benchmark.

The options stand here, in the root, so that pytest knows them from any subfolder.
"""

import contextlib
import os
from collections import defaultdict
from dataclasses import MISSING, fields
from inspect import signature

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU Triton's interpreter runs the kernels. Told before Triton is imported, which the
    # imports below may do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench import asked, options
from bench.reporting import Progress
from bench.saved_runs import SavedRuns
from bench.saving import SafeResults, end_in_order_on_sigterm
from blockshock.distributed import RankFailure, open_ranks
from blockshock.measure import environment
from blockshock.measure.clock import ReplayClock
from blockshock.phases.engine import Options
from blockshock.phases.families import FAMILIES
from blockshock.phases.session import CaseFailed, Laboratory

pytest_plugins = ["pytester"]  # runs of the benchmarks inside the tests

CLOCK = ReplayClock()


def pytest_addoption(parser):
    options.add(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "case(case): what a bench item measures")
    config.addinivalue_line("markers", "gpus(n): needs n GPUs; skipped, or failed by --require-gpu")
    families = asked.families(config.args, config.invocation_params.dir)
    config.stash[DEVICE] = options.check(config.option, ranks=asked.ranks(families))
    config.stash[PLAN] = _plan(config, families)
    config.pluginmanager.register(SavedRuns(config), "block-shock-saved-runs")
    config.pluginmanager.register(SafeResults(config), "block-shock-results")
    if options.first_rank():
        config.pluginmanager.register(Progress(config), "block-shock-progress")
        end_in_order_on_sigterm(config)


DEVICE = pytest.StashKey()
LABORATORY = pytest.StashKey()
PLAN = pytest.StashKey()


def pytest_report_header(config):
    facts = environment.describe(kind=config.stash[DEVICE], ranks=config.option.ranks)
    first = f"block-shock {facts['version']}: {facts['device']}, torch {facts['torch']}"
    return [first, *config.stash[PLAN].left_out]


def pytest_pycollect_makeitem(collector, name):
    """No item, where the sweep has no case of what a bench function asks."""
    family, phase = asked.family_of(collector.path), name.removeprefix("bench_")
    if not name.startswith("bench_") or not collector.path.stem.startswith("bench_"):
        return None
    wrong = asked.wrong_name(family, phase)
    if wrong:
        raise pytest.UsageError(f"{collector.path}, {name}: {wrong}")
    return None if collector.config.stash[PLAN].cases.get((family, phase)) else []


def pytest_generate_tests(metafunc):
    """Gives every bench function its cases, named by the method and the point."""
    if "record" not in metafunc.fixturenames:
        return
    family = asked.family_of(metafunc.definition.path)
    cases = metafunc.config.stash[PLAN].cases[
        family, metafunc.function.__name__.removeprefix("bench_")
    ]
    known = {field.name for field in fields(FAMILIES[family].case)}
    names = [name for name in signature(metafunc.function).parameters if name in known]
    values = [
        pytest.param(
            *(getattr(case, name) for name in names),
            _options(case, names),
            id=case.name,
            marks=[
                pytest.mark.case(case),
                pytest.mark.benchmark(timer=CLOCK, group=f"{case.group} {case.point_label}"),
            ],
        )
        for case in cases
    ]
    metafunc.parametrize((*names, "options"), values)


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("gpus")
    if marker:
        needed, found = marker.args[0], environment.gpu_count()
        if found < needed:
            reason = f"needs {needed} GPU{'s' if needed > 1 else ''}, found {found}"
            (pytest.fail if item.config.option.require_gpu else pytest.skip)(reason)


@pytest.fixture(scope="session")
def ranks(request):
    """The session's ranks: `ranks.run(fn, *args)` calls fn in each and returns their results."""
    option = request.config.option
    device = request.config.stash[DEVICE]
    if device == "cpu" and option.require_gpu:
        pytest.fail(
            f"--require-gpu: {option.ranks} GPUs are needed, {options.gpus_found()}", pytrace=False
        )
    progress = request.config.pluginmanager.get_plugin("block-shock-progress")
    tell = progress.tell if progress else None
    with open_ranks(option.ranks, device, tell=tell) as pool:
        yield pool


@pytest.fixture(scope="session")
def laboratory(request, ranks):
    """Measures cases on the ranks; see `blockshock.phases.session`."""
    option = request.config.option
    measuring = Options(
        mode=option.timing, l2=option.l2, rounds=option.rounds, profile=option.profile
    )
    lab = Laboratory(ranks, measuring, deadline=option.deadline)
    request.config.stash[LABORATORY] = lab
    if not option.benchmark_disable:
        with contextlib.suppress(RankFailure):  # each case will tell
            lab.ceilings()
    return lab


@pytest.fixture(scope="session")
def neighbours(request):
    """By point: the selected cases that can run here, in the order of collection."""
    points = defaultdict(list)
    for item in request.session.items:
        if "record" in item.fixturenames:
            (case,) = item.get_closest_marker("case").args
            if not case.unsupported(request.config.stash[DEVICE]):
                points[case.point].append(case)
    return points


@pytest.fixture
def record(benchmark, laboratory, neighbours):
    """record(case): measures the case beside the other methods of its point, and records it.

    With --benchmark-disable the case is only checked.
    """

    def run(case) -> None:
        reason = case.unsupported(laboratory.ranks.device)
        if reason:
            pytest.skip(reason)
        failure = None
        try:
            if benchmark.disabled:
                laboratory.check(case)
            else:
                samples, info = laboratory.result(case, neighbours[case.point])
        except CaseFailed as error:
            failure = str(error)
        if failure:  # raised here, not above: else pytest shows the same text twice
            pytest.fail(failure, pytrace=False)
        if benchmark.disabled:
            return
        benchmark.extra_info.update(info)
        CLOCK.replay(benchmark, samples)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    lab = config.stash.get(LABORATORY, None)
    facts = environment.describe(kind=config.stash[DEVICE], ranks=config.option.ranks)
    facts["ceilings"] = lab.options.ceilings if lab else None
    machine_info["blockshock"] = facts


def _plan(config, families: list[str]):
    option = config.option
    try:
        return asked.plan(families, option.sweep, option.set, config.stash[DEVICE], option.ranks)
    except (ValueError, ImportError) as error:  # of a sweep, or of what a file is not
        raise pytest.UsageError(str(error)) from None


def _options(case, shown: list[str]) -> dict:
    """What of a case is neither in the parameters of a bench function nor a default."""
    needed = [field.name for field in fields(case) if field.default is MISSING]
    default = type(case)(**{name: getattr(case, name) for name in needed}).as_dict()
    shown = ("phase", *shown)
    return {k: v for k, v in case.as_dict().items() if k not in shown and v != default[k]}
