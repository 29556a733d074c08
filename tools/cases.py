"""Measured cases as plain dataclasses: what a benchmark file says, once it has been read.

Also the words for them: labels, settings, the order of legends and tables.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tools.stats import Interval, ratio

# Order of the legends and tables; a method that is not here follows, by name.
METHODS = (
    "dense_single",
    "dense_tp_row",
    "dense_tp_column",
    "masked_split",
    "block_shock",
    "block_shock_folded",
    # of attention
    "reference",
    "sdpa_flash",
    "sdpa_cudnn",
    "flex",
    "flash_torch",
    "flash_triton",
    "block_sparse",
    "block_sparse_unpruned",
)
PHASES = ("correctness", "forward", "backward", "training", "drift")
# What a method may do in several ways; a label names those that are not the method's usual ones.
VARIANTS = ("mask", "kernel", "reduce")
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
    kernel: str | None = None
    reduce: str | None = None
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
    pattern: dict[str, Any] = field(default_factory=dict)  # of attention
    clocks: dict[str, Any] | None = None
    file: str = ""
    usual: dict[str, str | None] = field(default_factory=dict)  # of the method, by VARIANTS
    known: frozenset[str] = frozenset()  # the fields of the case that the file has

    @property
    def median(self) -> float:
        """The median sample in seconds."""
        ordered = sorted(self.samples)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    @property
    def unusual(self) -> dict[str, str]:
        """Mask, kernel and reduce where they are not what the method uses when nothing is asked."""
        chosen = {name: getattr(self.case, name) for name in VARIANTS}
        return {
            name: value
            for name, value in chosen.items()
            if value is not None and value != self.usual.get(name)
        }

    @property
    def as_usual(self) -> bool:
        """Whether kernel and reduce are the method's usual ones; the mask may be any."""
        return not {"kernel", "reduce"} & set(self.unusual)

    @property
    def label(self) -> str:
        """The name in plots and tables: method, the policy in training, and what is unusual."""
        case, unusual = self.case, self.unusual
        parts = [case.method]
        if "mask" in unusual:
            parts.append(unusual["mask"])
        if case.phase == "training" and case.policy not in (None, "plain"):
            parts.append(case.policy)
        # "auto" alone would not say what is chosen.
        parts += [
            f"auto {name}" if unusual[name] == "auto" else unusual[name]
            for name in ("kernel", "reduce")
            if name in unusual
        ]
        return " · ".join(parts)

    @property
    def run_label(self) -> str:
        """The name in `timing.interleaved_with`, as the run writes it."""
        unusual = self.unusual
        parts = [self.case.method, unusual.get("mask"), self.case.policy, unusual.get("kernel")]
        parts.append(f"reduce={unusual['reduce']}" if "reduce" in unusual else None)
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Results:
    """The results of one or more files of one device, each id once, and where they come from."""

    files: tuple[str, ...]
    machine: dict[str, Any]
    dates: tuple[str, ...]
    results: tuple[Result, ...]
    notes: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()  # of the code that measured, short; "+ changes" where dirty

    @property
    def device(self) -> str:
        """The device in words, as the machine was asked: "2x NVIDIA H200"."""
        return str(self.machine["device"])

    @property
    def cpu(self) -> bool:
        """Whether the times are a CPU's, and so say nothing about GPUs."""
        return self.machine["kind"] == "cpu"

    @property
    def clock(self) -> str:
        """What the times are of: "device time", or "host time" on a CPU."""
        return "host time" if self.cpu else "device time"

    @property
    def title(self) -> str:
        """The device as plot titles carry it, with cold caches and with the caveat on a CPU."""
        parts = [self.device, "cold L2" if "cold" in self.caches else ""]
        parts.append(CPU_CAVEAT if self.cpu else "")
        return " · ".join(part for part in parts if part)

    @property
    def caches(self) -> set[str]:
        """The states of the L2 cache that the samples began with: "warm", "cold"."""
        return {str(r.timing["l2"]) for r in self.results if r.timing.get("l2")}

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
    return all(
        other is first
        or (
            other.file == first.file
            and len(other.samples) == len(first.samples)
            and other.run_label in partners
        )
        for other in others
    )


def over(result: Result, reference: Result) -> Interval:
    """Time of `result` over that of `reference`, with its interval: the one that every tool shows.

    Rounds measured together are resampled together (stats.py).
    """
    return ratio(result.samples, reference.samples, paired=interleaved([result, reference]))


def setting(case: Case) -> tuple:
    """What two cases must share to be put on one line, or to be compared: all but the method, its
    mask, kernel, reduce and policy, the sizes N and B, and the seed.
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
    """Sorts results: phase, sizes, method, its usual way first, then whatever else differs."""
    case = result.case
    phase = PHASES.index(case.phase) if case.phase in PHASES else len(PHASES)
    sizes = (case.dtype or "", case.N or 0, case.K or 0, case.B or 0)
    line = (method_order(case.method), len(result.unusual))
    return (case.family, phase, case.phase, *sizes, line, result.id)
