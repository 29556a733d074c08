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
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU Triton's interpreter runs the kernels. Told before Triton is imported, which the
    # imports below may do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench import asked
from bench.reporting import Progress, SafeResults
from blockshock.distributed import RankFailure, open_ranks
from blockshock.measure import environment
from blockshock.measure.clock import CACHES, MODES, ReplayClock
from blockshock.phases.engine import Options
from blockshock.phases.families import FAMILIES
from blockshock.phases.session import CaseFailed, Laboratory

pytest_plugins = ["pytester"]  # runs of the benchmarks inside the tests

CLOCK = ReplayClock()


def pytest_addoption(parser):
    group = parser.getgroup("block-shock")
    add = group.addoption
    add("--sweep", default="quick", metavar="NAME", help="a file of bench/sweeps, or a path")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=V[,V]",
        help="override an axis of the sweep, e.g. --set N=4096,8192",
    )
    add(
        "--ranks",
        type=int,
        help="processes that measure together (default 2, or 1 where what is asked takes one; "
        "under torchrun, all it started)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda with a GPU for each rank, else cpu",
    )
    add("--require-gpu", action="store_true", help="what is skipped for want of a GPU fails")
    add("--results", metavar="FILE", help="write the benchmark JSON here, whole or not at all")
    add("--rounds", type=int, default=30, help="at most so many samples a case (default 30)")
    add("--timing", choices=MODES, help="default: graph on GPUs, host on the CPU")
    add("--l2", choices=CACHES, default="warm", help="what a sample finds in the L2 (GPUs)")
    add(
        "--profile",
        metavar="DIR",
        nargs="?",
        const="build/profile",
        help="write a torch.profiler trace and a kernel table per case (--profile=DIR: there)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "gpus(n): needs n GPUs; skipped, or failed by --require-gpu")
    families = asked.families(config.args, config.invocation_params.dir)
    if config.option.ranks is None:
        config.option.ranks = int(os.environ.get("WORLD_SIZE", asked.ranks(families)))
    if config.option.ranks < 1:
        raise pytest.UsageError(f"--ranks {config.option.ranks}: at least one rank is needed")
    given = int(os.environ.get("WORLD_SIZE", config.option.ranks))
    if config.option.ranks != given:
        raise pytest.UsageError(
            f"--ranks {config.option.ranks}: this job was started with {given} ranks (WORLD_SIZE), "
            "which cannot be changed from within; leave the option out"
        )
    if config.option.rounds < 1:
        raise pytest.UsageError(f"--rounds {config.option.rounds}: at least one sample is needed")
    _check_profile(config.option.profile)
    config.stash[DEVICE] = _device(config.option)
    host = config.stash[DEVICE] == "cpu"
    if config.option.timing and (config.option.timing == "host") != host:
        valid = "host" if host else "graph, events, sync"
        raise pytest.UsageError(
            f"--timing {config.option.timing} on {config.stash[DEVICE]}; valid there: {valid}"
        )
    if config.option.l2 == "cold" and host:
        raise pytest.UsageError("--l2 cold on cpu: only a GPU's L2 can be emptied; leave it out")
    config.stash[PLAN] = _plan(config, families)
    if int(os.environ.get("RANK", 0)):
        # Under torchrun every rank runs the suite; the first one reports and saves.
        config.option.results, config.option.verbose = None, -2
        config.option.benchmark_quiet = True
    else:
        config.pluginmanager.register(Progress(config), "block-shock-progress")
    config.pluginmanager.register(SafeResults(config), "block-shock-results")


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
    values = [(*(getattr(case, name) for name in names), _options(case, names)) for case in cases]
    metafunc.parametrize((*names, "options"), values, ids=[case.name for case in cases])


def pytest_collection_modifyitems(items):
    for item in items:
        if "record" in item.fixturenames:
            case = case_of(item)
            # One marker with both: pytest-benchmark reads only the closest one.
            group = f"{case.group} {case.point_label}"
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=group))


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
        pytest.fail(f"--require-gpu: {option.ranks} GPUs are needed, {_found()}", pytrace=False)
    with open_ranks(option.ranks, device) as pool:
        yield pool


@pytest.fixture(scope="session")
def laboratory(request, ranks):
    """Measures cases on the ranks; see `blockshock.phases.session`."""
    option = request.config.option
    measuring = Options(
        mode=option.timing, l2=option.l2, rounds=option.rounds, profile=option.profile
    )
    lab = Laboratory(ranks, measuring)
    request.config.stash[LABORATORY] = lab
    with contextlib.suppress(RankFailure):  # each case will tell
        lab.ceilings()
    return lab


@pytest.fixture(scope="session")
def neighbours(request):
    """By point: the selected cases that can run here, in the order of collection."""
    points = defaultdict(list)
    for item in request.session.items:
        if "record" in item.fixturenames:
            case = case_of(item)
            if not case.unsupported(request.config.stash[DEVICE]):
                points[case.point].append(case)
    return points


@pytest.fixture
def record(benchmark, laboratory, neighbours):
    """record(case): measures the case beside the other methods of its point, and records it."""

    def run(case) -> None:
        if benchmark.disabled:
            pytest.fail(
                "benchmarks are disabled here (by -n or --benchmark-disable)", pytrace=False
            )
        reason = case.unsupported(laboratory.ranks.device)
        if reason:
            pytest.skip(reason)
        failure = None
        try:
            samples, info = laboratory.result(case, neighbours[case.point])
        except CaseFailed as error:
            failure = str(error)
        if failure:  # raised here, not above: else pytest shows the same text twice
            pytest.fail(failure, pytrace=False)
        benchmark.extra_info.update(info)
        CLOCK.replay(benchmark, samples)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    lab = config.stash.get(LABORATORY, None)
    facts = environment.describe(kind=config.stash[DEVICE], ranks=config.option.ranks)
    facts["ceilings"] = lab.options.ceilings if lab else None
    machine_info["blockshock"] = facts


def case_of(item):
    """The case of a bench item."""
    params = dict(item.callspec.params)
    options = params.pop("options")
    made = FAMILIES[asked.family_of(item.path)].case
    return made(phase=item.originalname.removeprefix("bench_"), **params, **options)


def _plan(config, families: list[str]):
    option = config.option
    try:
        return asked.plan(families, option.sweep, option.set, config.stash[DEVICE], option.ranks)
    except (ValueError, ImportError) as error:  # a SweepError, or what a file is not
        raise pytest.UsageError(str(error)) from None


def _options(case, shown: list[str]) -> dict:
    """What of a case is neither in the parameters of a bench function nor a default."""
    needed = [field.name for field in fields(case) if field.default is MISSING]
    default = type(case)(**{name: getattr(case, name) for name in needed}).as_dict()
    shown = ("phase", *shown)
    return {k: v for k, v in case.as_dict().items() if k not in shown and v != default[k]}


def _device(option) -> str:
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", option.ranks))  # torchrun may span hosts
    enough = environment.gpu_count() >= needed
    if option.device == "cuda" and not enough:
        raise pytest.UsageError(
            f"--device cuda: {needed} GPUs are needed, one for each rank, {_found()}; use "
            "--device cpu, or fewer --ranks"
        )
    if option.device != "auto":
        return option.device
    return "cuda" if enough else "cpu"


def _check_profile(folder: str | None) -> None:
    """`--profile` may stand alone, and then takes the path of a benchmark behind it for DIR."""
    path = Path(folder or ".").absolute()
    tests = path.suffix == ".py" or "::" in path.name or path.is_file()
    if folder and (tests or [*path.glob("bench_*.py"), *path.glob("test_*.py")]):
        raise pytest.UsageError(
            f"--profile {folder}: traces are not written there; put --profile last, or write "
            "--profile=DIR"
        )


def _found() -> str:
    count = environment.gpu_count()
    return f"found {count}" + ("" if torch.version.cuda else " (a build of torch without CUDA)")
