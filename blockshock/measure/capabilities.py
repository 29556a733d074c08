"""What this machine can run, and what is missing where it cannot.

The suite decides its skips with these before any rank starts, so nothing here creates a CUDA
context; the doctor, `python -m blockshock`, prints them.
"""

import functools
import importlib.util
from typing import NamedTuple

import torch

from blockshock.measure import environment, nvidia_smi


class Capability(NamedTuple):
    """ok: whether it can run; needed and found: what it takes and what is here, in words."""

    ok: bool
    needed: str
    found: str


@functools.cache
def capabilities() -> dict[str, Capability]:
    """Name -> (ok, needed, found), read once a process: the keys of `CAPABILITIES` below."""
    machine = _Machine()
    return {name: look(machine) for name, look in CAPABILITIES.items()}


def why_not(name: str) -> str | None:
    """None when this machine can; else the reason of a skip: "needs two GPUs; found one GPU".

    Raises ValueError for a name that is no capability.
    """
    known = capabilities()
    if name not in known:
        raise ValueError(f"no capability is called {name!r}; there are {', '.join(known)}")
    ok, needed, found = known[name]
    return None if ok else f"needs {needed}; found {found}"


class _Machine:
    """What several capabilities look at, read once."""

    def __init__(self) -> None:
        self.count = environment.gpu_count()
        # Rows of the visible GPUs as nvidia-smi has them; torch may see fewer, or none at all.
        self.rows, self.problem = nvidia_smi.visible_gpus("name,compute_cap")
        self.names = [row["name"] or "NVIDIA GPU" for row in self.rows]

    def gpus(self) -> str:
        if not self.count:
            return "no GPU"
        return environment.device_name(self.names[: self.count], self.count)


def _cuda(machine: _Machine) -> Capability:
    needed = "an NVIDIA GPU, its driver and a CUDA build of torch"
    build = f"torch {torch.__version__}"
    if machine.count:
        return Capability(True, needed, f"{machine.gpus()}, {build} for CUDA {torch.version.cuda}")
    cuda = torch.version.cuda
    build += f" for CUDA {cuda}" if cuda else ", a build without CUDA"
    if machine.problem:
        return Capability(False, needed, f"{build}, and no GPU: {machine.problem}")
    listed = environment.device_name(machine.names, len(machine.names))
    if cuda is None:
        return Capability(False, needed, f"{build}, beside {listed}: install the CUDA build")
    return Capability(False, needed, f"{build}, which sees none of {listed} in nvidia-smi")


def _two_gpus(machine: _Machine) -> Capability:
    return Capability(machine.count >= 2, "two GPUs", machine.gpus())


def _cusparselt(machine: _Machine) -> Capability:
    needed = "a GPU of compute capability 8.0 or newer and a torch built with cuSPARSELt"
    version = environment.versions()["cusparselt"]
    library = f"cuSPARSELt {version}" if version else "no cuSPARSELt in this torch"
    # One that nvidia-smi did not give is not held against the GPU: CUDA itself will say.
    read = {row["compute_cap"] for row in machine.rows[: machine.count]} - {None}
    too_old = [generation for generation in read if (environment.scaled(generation) or 8) < 8]
    found = f"{machine.gpus()}, {library}"
    if read:
        found += f", compute capability {', '.join(sorted(read))}"
    return Capability(bool(machine.count and version and not too_old), needed, found)


def _triton(machine: _Machine) -> Capability:
    version = environment.versions()["triton"]
    found = f"{machine.gpus()}, Triton {version}" if version else f"{machine.gpus()}, no Triton"
    return Capability(bool(machine.count and version), "a GPU and Triton", found)


def _triton_interpreter(machine: _Machine) -> Capability:
    """Triton's interpreter runs kernels in NumPy, on any processor Triton has a package for."""
    version, array = environment.versions()["triton"], importlib.util.find_spec("numpy")
    found = f"Triton {version}" if version else "no Triton"
    return Capability(
        bool(version and array), "Triton and NumPy", found if array else f"{found}, no NumPy"
    )


def _symmetric_memory(machine: _Machine) -> Capability:
    needed = "two GPUs that reach each other's memory and torch's symmetric memory"
    if machine.count < 2:
        return Capability(False, needed, machine.gpus())
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return Capability(False, needed, f"torch {torch.__version__} without symmetric memory")
    matrix, problem = nvidia_smi.peer_access()
    access = nvidia_smi.submatrix(matrix, machine.rows[: machine.count])
    if access is None:
        return Capability(False, needed, f"{machine.gpus()}, peer access unknown: {problem}")
    states = {state for i, row in enumerate(access) for j, state in enumerate(row) if i != j}
    found = f"{machine.gpus()}, peer access {', '.join(sorted(states))}"
    return Capability(states == {"OK"}, needed, found)


def _safetensors(machine: _Machine) -> Capability:
    version = environment.installed("safetensors")
    found = f"safetensors {version}" if version else "no safetensors"
    return Capability(bool(version), "safetensors (pip install 'blockshock[files]')", found)


def _gloo(machine: _Machine) -> Capability:
    ok = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    found = "gloo" if ok else f"torch {torch.__version__} without gloo"
    return Capability(ok, "a torch built with gloo, for ranks on the CPU", found)


CAPABILITIES = {
    "gloo": _gloo,
    "cuda": _cuda,
    "two_gpus": _two_gpus,
    "cusparselt": _cusparselt,
    "triton": _triton,
    "triton_interpreter": _triton_interpreter,
    "symmetric_memory": _symmetric_memory,
    "safetensors": _safetensors,
}
