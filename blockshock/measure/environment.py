"""The machine a result was measured on, as plain data that JSON can hold.

`describe` goes into every result file, `clocks` before and after every case. Both run in the parent
of the ranks and create no CUDA context there: what torch would have to start CUDA for is asked of
`nvidia-smi` instead.
"""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from blockshock.measure import nvidia_smi
from blockshock.version import __version__

_GPU_FIELDS = "name,memory.total,power.limit,clocks.max.sm,compute_cap,driver_version"
_CLOCK_FIELDS = {"sm_mhz": "clocks.sm", "power_w": "power.draw", "temperature_c": "temperature.gpu"}
_READ = {"capture_output": True, "text": True, "check": True, "timeout": 10}
_CLOCK_TIMEOUT = 2.0  # seconds; clocks are read twice a case


def describe(*, kind: str | None = None, ranks: int | None = None) -> dict:
    """Facts of this machine: `machine_info["blockshock"]`, all but the measured ceilings.

    kind: "cuda" or "cpu"; left out, "cuda" where torch sees a GPU.
    ranks: one GPU each, so only the first `ranks` GPUs are described; left out, all of them.
    """
    count = gpu_count()
    kind = kind or ("cuda" if count else "cpu")
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"kind is {kind!r}; the kinds of machine are 'cuda' and 'cpu'")
    facts = {
        "device": f"CPU ({ranks} gloo ranks)" if ranks else "CPU",
        "kind": kind,
        "ranks": ranks,
        "backend": "nccl" if kind == "cuda" else "gloo",
        **versions(),
        "driver": None,
        "gpus": [],
        "topology": None,
        "power_limit_w": [],
        "problem": None,
        **host(),
    }
    if kind == "cuda":
        facts.update(_gpu_facts(min(count, ranks or count)))
    return facts


def _gpu_facts(count: int) -> dict:
    """Of the first `count` visible GPUs; "problem" says in words what could not be read."""
    rows, problem = nvidia_smi.visible_gpus(_GPU_FIELDS)
    rows = rows[:count]
    gpus = [
        {
            "name": row["name"],
            "memory_bytes": scaled(row["memory.total"], 2**20),
            "power_limit_w": scaled(row["power.limit"]),
            "sm_max_mhz": scaled(row["clocks.max.sm"]),
            "compute_capability": row["compute_cap"],
        }
        for row in rows
    ]
    topology = None
    if rows:
        matrix, problem = nvidia_smi.links()
        topology = nvidia_smi.submatrix(matrix, rows)
    return {
        "device": device_name([gpu["name"] for gpu in gpus], count),
        "driver": rows[0]["driver_version"] if rows else None,
        "gpus": gpus,
        "topology": topology,
        "power_limit_w": [gpu["power_limit_w"] for gpu in gpus],
        "problem": problem,
    }


def device_name(names: list[str], count: int) -> str:
    """["NVIDIA H200"] * 2 -> "2x NVIDIA H200"; with no names, so many of a nameless GPU."""
    if not names:
        return f"{count}x NVIDIA GPU"
    return " + ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))


def gpu_count() -> int:
    """GPUs that torch can use: 0 for a CPU build. Counted by NVML, without starting CUDA."""
    return torch.cuda.device_count() if torch.version.cuda else 0


def versions() -> dict[str, str | None]:
    """Versions of blockshock, Python, torch and torch's libraries; None for what is missing."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": _nccl(),
        "cusparselt": _cusparselt(),
        "triton": installed("triton"),
    }


def host() -> dict:
    """Processor, the cores this process may use, and the system."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = named[0].partition(":")[2].strip() if named else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cpu_cores": cores, "system": f"{platform.system()} {platform.release()}"}


def commit() -> dict | None:
    """{"id", "dirty"} of the checkout that this package lies in; None for an installed one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = "git", "-C", str(root)
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **_READ).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], **_READ).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or one that refuses the folder
        return None
    return {"id": head, "dirty": bool(changed)}


def clocks(indices: list[int]) -> list[dict] | None:
    """SM clock (MHz), power (W) and temperature (°C) of the GPUs `cuda:i`, in the order given.

    A figure that the driver does not give is None. None altogether where nothing can be read;
    `why_no_clocks` then says why.
    """
    return _read_clocks(indices)[0]


def why_no_clocks() -> str | None:
    """Why `clocks` gives None for the first GPU; None when it reads it."""
    return _read_clocks([0])[1]


def _read_clocks(indices: list[int]) -> tuple[list[dict] | None, str | None]:
    count = gpu_count()
    if not indices or max(indices) >= count:
        return None, f"torch sees {count or 'no'} GPU{'s' if count > 1 else ''}"
    try:
        return [_clocks_by_nvml(index) for index in indices], None
    except Exception:  # nvidia-ml-py is missing, or fails in one of its many own ways
        fields = ",".join(_CLOCK_FIELDS.values())
        rows, problem = nvidia_smi.visible_gpus(fields, timeout=_CLOCK_TIMEOUT)
    if not problem and max(indices) >= len(rows):
        problem = f"nvidia-smi lists {len(rows)} of the {count} GPUs that torch sees"
    if problem:
        return None, problem
    chosen = [rows[index] for index in indices]
    return [
        {name: scaled(row[field]) for name, field in _CLOCK_FIELDS.items()} for row in chosen
    ], None


def _clocks_by_nvml(index: int) -> dict:
    return {
        "sm_mhz": torch.cuda.clock_rate(index),
        "power_w": torch.cuda.power_draw(index) / 1000,
        "temperature_c": torch.cuda.temperature(index),
    }


def scaled(text: str | None, factor: int = 1) -> int | float | None:
    """ "700.00" -> 700, "345.5" -> 345.5; None for what is no number."""
    try:
        value = float(text) * factor
    except (TypeError, ValueError):
        return None
    return int(value) if value.is_integer() else value


def _nccl() -> str | None:
    if not torch.version.cuda or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _cusparselt() -> str | None:
    """803 -> "0.8.3": the integer is major * 1000 + minor * 100 + patch (cusparseLt.h)."""
    library = torch.backends.cusparselt
    number = library.version() if library.is_available() else None
    return f"{number // 1000}.{number // 100 % 10}.{number % 100}" if number else None


def installed(package: str) -> str | None:
    """Version of an installed package, read without importing it; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
