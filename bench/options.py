"""The options of a run: declared, checked and completed before anything is collected.

Whatever cannot work is one clear usage error here, and not a failure after minutes of measuring.
"""

import os
from pathlib import Path

import pytest
import torch

from blockshock.distributed.ranks import launched
from blockshock.measure import environment
from blockshock.measure.clock import CACHES, MODES

DEADLINE_SECONDS = 600.0


def add(parser) -> None:
    """Declares the options."""
    add = parser.getgroup("block-shock").addoption
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
    add(
        "--timing",
        choices=MODES,
        help="default: graph on GPUs, or events where steps cannot be captured; host on the CPU",
    )
    add("--l2", choices=CACHES, default="warm", help="what a sample finds in the L2 (GPUs)")
    add(
        "--deadline",
        type=float,
        default=DEADLINE_SECONDS,
        metavar="SECONDS",
        help="end the ranks when the cases of a point take longer (default %(default)g)",
    )
    add(
        "--profile",
        metavar="DIR",
        nargs="?",
        const="build/profile",
        help="write a torch.profiler trace and a kernel table per case (--profile=DIR: there)",
    )


def check(option, ranks: int) -> str:
    """Checks the options and sets `option.ranks`; returns the device, "cpu" or "cuda".

    ranks: how many there are where nothing says it. Raises pytest.UsageError.
    """
    option.ranks = _ranks(option.ranks, ranks)
    if option.benchmark_enable:  # it wins over --benchmark-disable
        option.benchmark_disable = False
    if option.rounds < 1:
        raise pytest.UsageError(f"--rounds {option.rounds}: at least one sample is needed")
    if not 0 < option.deadline < float("inf"):
        raise pytest.UsageError(f"--deadline {option.deadline:g}: a number of seconds above 0")
    _check_profile(option.profile)
    device = _device(option)
    host = device == "cpu"
    if option.timing and (option.timing == "host") != host:
        valid = "host" if host else "graph, events, sync"
        raise pytest.UsageError(f"--timing {option.timing} on {device}; valid there: {valid}")
    if option.l2 == "cold" and host:
        raise pytest.UsageError("--l2 cold on cpu: only a GPU's L2 can be emptied; leave it out")
    return device


def first_rank() -> bool:
    """Whether this process reports and saves: under torchrun every rank runs the suite."""
    return not launched() or os.environ["RANK"] == "0"


def gpus_found() -> str:
    """How many GPUs torch can use, in words."""
    count = environment.gpu_count()
    return f"found {count}" + ("" if torch.version.cuda else " (a build of torch without CUDA)")


def _ranks(asked: int | None, usual: int) -> int:
    numbers = {name: os.environ.get(name, "0") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    for name, value in numbers.items():
        if not value.isdecimal():
            raise pytest.UsageError(
                f"{name}={value} in the environment is not a number: unset it, or start with "
                "torchrun, which sets it"
            )
    given = int(numbers["WORLD_SIZE"]) if launched() else None
    if asked is not None and asked < 1:
        raise pytest.UsageError(f"--ranks {asked}: at least one rank is needed")
    if None not in (asked, given) and asked != given:
        raise pytest.UsageError(
            f"--ranks {asked}: this job was started with {given} ranks (WORLD_SIZE), "
            "which cannot be changed from within; leave the option out"
        )
    return given or asked or usual


def _device(option) -> str:
    local = os.environ.get("LOCAL_WORLD_SIZE") if launched() else None  # it may span hosts
    needed = int(local or option.ranks)
    enough = environment.gpu_count() >= needed
    if option.device == "cuda" and not enough:
        raise pytest.UsageError(
            f"--device cuda: {needed} GPUs are needed, one for each rank, {gpus_found()}; use "
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
