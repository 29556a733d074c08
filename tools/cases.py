"""Measured cases as plain dataclasses: what a benchmark file says, once it has been read.

What cases are called, how they are ordered and which of them stand on one line is their family's
to say: its Naming.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from tools.stats import Interval, ratio

CPU_CAVEAT = "CPU: says nothing about GPUs"


@dataclass(frozen=True)
class Case:
    """One point: what was computed, how, and at which size. The other fields are read as attributes
    (`case.N`), each as its file has it; one that the file does not have is None.
    """

    family: str
    phase: str
    method: str
    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of Python's own protocols, such as copying
            raise AttributeError(name)
        return self.fields.get(name)

    def __hash__(self) -> int:
        return hash((self.family, self.phase, self.method, frozenset(self.fields.items())))

    def but(self, **changes: Any) -> "Case":
        """The same case with other values in some of its fields."""
        return replace(self, fields=self.fields | changes)


@dataclass(frozen=True)
class Naming:
    """How the cases of a family are named, ordered and compared; the defaults suit any family.

    methods: by name, in reading order, the colour and marker of its lines. phases: likewise in
    order. Others follow, as their file has them.
    sizes: the fields that say how large a case is, positive integers, in the order of sorting.
    line: the fields that tell the lines of a method apart. A label names those that are unusual.
    ways: those of them that change how it is computed, not what.
    setting: what two cases share, beside sizes and line, that stand in one figure: in words.
    run_label: the name that a run writes into `timing.interleaved_with`.
    """

    methods: dict[str, tuple[str, str]] = field(default_factory=dict)
    phases: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    line: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()
    label: Callable[["Result"], str] = lambda result: " · ".join(
        [result.case.method, *map(str, result.unusual.values())]
    )
    run_label: Callable[["Result"], str] = lambda result: result.case.method
    setting: Callable[[Case], str] = lambda case: case.dtype or ""

    def place(self, method: str) -> int:
        """Sorts methods: the known ones in reading order, then the others."""
        return _place(tuple(self.methods), method)


PLAIN = Naming()


@dataclass(frozen=True)
class Region:
    """A named part of a step; times in seconds, summed over its calls in one step."""

    avg: float
    p50: float
    p95: float


@dataclass(frozen=True)
class Result:
    """One measured case. `samples` are seconds, in the order of the rounds."""

    id: str
    case: Case
    samples: tuple[float, ...]
    timing: dict[str, Any] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    drift: dict[str, tuple[float, ...]] = field(default_factory=dict)
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)  # by name, a value a step
    memory: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    pattern: dict[str, Any] = field(default_factory=dict)
    clocks: dict[str, Any] | None = None
    file: str = ""
    usual: dict[str, str | None] = field(default_factory=dict)  # of the method, by field of a line
    naming: Naming = PLAIN

    @property
    def median(self) -> float:
        """The median sample in seconds."""
        return median(self.samples)

    @property
    def p95(self) -> float:
        """The sample in seconds that 95% of the samples do not exceed."""
        return sorted(self.samples)[round(0.95 * (len(self.samples) - 1))]

    @property
    def unusual(self) -> dict[str, str]:
        """The fields of its line that are not what the method uses when nothing is asked."""
        chosen = {name: getattr(self.case, name) for name in self.naming.line}
        return {
            name: value
            for name, value in chosen.items()
            if value is not None and value != self.usual.get(name)
        }

    @property
    def as_usual(self) -> bool:
        """Whether it was computed in the method's usual way, whatever was computed."""
        return not set(self.naming.ways) & set(self.unusual)

    @property
    def label(self) -> str:
        """The name in plots and tables."""
        return self.naming.label(self)

    @property
    def run_label(self) -> str:
        """The name in `timing.interleaved_with`, as the run writes it."""
        return self.naming.run_label(self)

    @property
    def setting(self) -> str:
        """What it shares with all results of a figure, in words."""
        return self.naming.setting(self.case)

    @property
    def line_order(self) -> tuple:
        """Sorts lines: by method, its usual way first."""
        return (self.naming.place(self.case.method), len(self.unusual))


@dataclass(frozen=True)
class Results:
    """The results of one or more files of one device, each id once, and where they come from.

    Where ranks are compared, an id is there once for each number of them.
    """

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

    @property
    def days(self) -> str:
        """The dates of the runs, in order."""
        return ", ".join(sorted({date[:10] for date in self.dates if date}))

    def only(self, family: str) -> "Results":
        return replace(self, results=tuple(r for r in self.results if r.case.family == family))

    def of(self, phase: str) -> tuple[Result, ...]:
        """The results of one phase that have every size which plots and verdicts need."""
        return tuple(
            result
            for result in self.results
            if result.case.phase == phase
            and None not in [getattr(result.case, size) for size in result.naming.sizes]
        )


def grouped(results: Iterable[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    """The results of each key, both in the order given."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return groups


def over_ranks(results: Iterable[Result]) -> list[list[Result]]:
    """The cases that were measured on several numbers of ranks, each with the fewest first."""
    cases = grouped(sorted(results, key=lambda r: r.case.ranks or 0), lambda r: r.id).values()
    return [found for found in cases if len({r.case.ranks for r in found}) > 1]


def fastest(results: Iterable[Result]) -> Result | None:
    """The one with the shortest median of all its rounds: the ratio to it is that of two results,
    the same wherever it is shown. None where there are none.
    """
    return min(results, key=lambda result: result.median, default=None)


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


def order(result: Result) -> tuple:
    """Sorts results: family, phase, sizes, line; the rest as their file has it."""
    case, naming = result.case, result.naming
    sizes = [getattr(case, size) or 0 for size in naming.sizes]
    phase = _place(naming.phases, case.phase)
    return (case.family, phase, case.dtype or "", *sizes, result.line_order)


def _place(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else len(names)
