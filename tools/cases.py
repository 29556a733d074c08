"""Measured cases as plain dataclasses: what a benchmark file says, once it has been read.

Also the words for them: labels, settings, the order of legends and tables.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# Order of the legends and tables; a method that is not here follows, by name.
METHODS = (
    "dense_single",
    "dense_tp_row",
    "dense_tp_column",
    "masked_split",
    "block_shock",
    "block_shock_folded",
)
PHASES = ("correctness", "forward", "backward", "training", "drift")
# A mask is part of a method's label only where it is not this one.
CPU_CAVEAT = "CPU: says nothing about GPUs"


@dataclass(frozen=True)
class Case:
    """One point: what was computed, how, and at which size. Fields a family has not are None."""

    family: str
    phase: str
    method: str
    N: int | None = None
    K: int | None = None
    B: int | None = None
    dtype: str | None = None
    mask: str | None = None
    policy: str | None = None
    optimizer: str | None = None
    bias: bool | None = None
    input: str | None = None
    loss: str | None = None
    target: str | None = None
    weight: str | None = None
    ranks: int | None = None
    steps: int | None = None
    seed: int | None = None
    other: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Region:
    """A named part of a step; times in seconds, summed over its calls in one step."""

    avg: float
    p50: float
    p95: float
    calls: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Result:
    """One measured case. `samples` are seconds, in the order of the rounds."""

    id: str
    case: Case
    samples: tuple[float, ...]
    device: str
    timing: dict[str, Any] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    drift: dict[str, tuple[float, ...]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    clocks: dict[str, Any] | None = None
    file: str = ""
    usual_mask: str | None = None  # of the method, as the run that measured it says

    @property
    def median(self) -> float:
        """The median sample in seconds."""
        ordered = sorted(self.samples)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    @property
    def label(self) -> str:
        """The name in plots and tables: method, an unusual mask, and the policy in training."""
        case = self.case
        parts = [case.method]
        if case.mask not in (None, self.usual_mask):
            parts.append(case.mask)
        if case.phase == "training" and case.policy not in (None, "plain"):
            parts.append(case.policy)
        return " · ".join(parts)


@dataclass(frozen=True)
class Results:
    """The results of one or more files of one device, each id once, and where they come from."""

    files: tuple[str, ...]
    machine: dict[str, Any]
    dates: tuple[str, ...]
    results: tuple[Result, ...]
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """The device in words, as the machine was asked: "2x NVIDIA H200"."""
        return str(self.machine["device"])

    @property
    def cpu(self) -> bool:
        """Whether the times are a CPU's, and so say nothing about GPUs."""
        return self.machine["kind"] == "cpu"

    @property
    def title(self) -> str:
        """The device as plot titles carry it, with the caveat on a CPU."""
        return f"{self.device} · {CPU_CAVEAT}" if self.cpu else self.device

    @property
    def versions(self) -> str:
        """The software in one line, as far as it is known."""
        names = ("torch", "cuda", "nccl", "cusparselt", "triton", "driver")
        shown = {"torch": "PyTorch", "cuda": "CUDA", "nccl": "NCCL", "cusparselt": "cuSPARSELt"}
        return ", ".join(
            f"{shown.get(name, name)} {self.machine[name]}"
            for name in names
            if self.machine.get(name)
        )

    def of(self, phase: str, family: str = "linear") -> tuple[Result, ...]:
        """The results of one phase with the sizes that plots and verdicts need."""
        return tuple(
            result
            for result in self.results
            if (result.case.phase, result.case.family) == (phase, family)
            and result.case.N is not None
            and result.case.B is not None
        )


def interleaved(results: Iterable[Result]) -> bool:
    """Whether these were measured in one run, round by round, so that their rounds are the same."""
    first, *others = results
    partners = first.timing.get("interleaved_with")
    if not isinstance(partners, list):
        return False
    # The runs' own labels are joined by dashes and name the policy of plain dense as well.
    named = {str(partner).removesuffix("-plain") for partner in partners}
    return all(
        other.file == first.file
        and len(other.samples) == len(first.samples)
        and other.label.replace(" · ", "-") in named
        for other in others
    )


def setting(case: Case) -> tuple:
    """What two cases must share to be put on one line, or to be compared: all but the method, its
    mask and policy, the sizes N and B, and the seed.
    """
    inner = None if case.K == case.N else case.K
    data = (case.bias, case.input, case.loss, case.target, case.weight)
    return (case.dtype, case.ranks, *data, inner, case.optimizer, case.other)


def setting_text(case: Case) -> str:
    """The setting in words, without what is usual (gaussian input, bias, two ranks, K=N)."""
    parts = [case.dtype or ""]
    if case.optimizer and case.phase == "training":
        parts.append(case.optimizer)
    if case.ranks not in (None, 2):
        parts.append(f"{case.ranks} ranks")
    if case.bias is False:
        parts.append("no bias")
    if case.input not in (None, "gaussian"):
        parts.append(f"input {case.input}")
    if case.loss not in (None, "mse_target"):
        parts.append(f"loss {case.loss}")
    if case.target not in (None, "normal"):
        parts.append(f"target {case.target}")
    if case.weight is not None:
        parts.append(f"weight {case.weight}")
    if case.K not in (None, case.N):
        parts.append(f"K={case.K}")
    parts += [f"{name}={value}" for name, value in case.other]
    return ", ".join(part for part in parts if part)


def method_order(method: str) -> tuple[int, str]:
    """Sorts methods: the known ones in reading order, then the others by name."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def order(result: Result) -> tuple:
    """Sorts results: phase, sizes, method, then whatever else tells two cases apart."""
    case = result.case
    phase = PHASES.index(case.phase) if case.phase in PHASES else len(PHASES)
    sizes = (case.dtype or "", case.N or 0, case.K or 0, case.B or 0)
    return (case.family, phase, case.phase, *sizes, method_order(case.method), result.id)
