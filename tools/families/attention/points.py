"""Attention results: the point that each was measured at, and what it is compared with.

A point is everything but the method: phase, sizes, dtype, mask. Ratios are of speed, so above 1
the first method is the faster; those of one point and one run are of the same rounds (stats.py).

    share      pairs that attend, of Tq · Tk:  1 - s for a pattern of sparsity s
    ideal      share of the dense kernel over share of the pattern: 1 / (1 - s) where all attend
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from tools.cases import Case, Naming, Result, Results, fastest, grouped, interleaved, order
from tools.stats import Interval, ratio

FAMILY = "attention"
PHASES = {"forward": "forward", "forward_backward": "forward and backward"}
OURS, PEERS = "flash_triton", ("sdpa_flash", "sdpa_cudnn", "flex")
SPARSE, UNPRUNED, FLEX = "block_sparse", "block_sparse_unpruned", "flex"
# The order of tables and bars; a tier that is not here follows, by name.
TIERS = ("small", "medium", "large", "XXL", "long", "rectangular")
SIZES = ("batch", "heads", "kv_heads", "Tq", "Tk", "D")
NAMING = Naming(
    methods={
        "reference": ("#7a7f87", "s"),
        "sdpa_flash": ("#0072b2", "o"),
        "sdpa_cudnn": ("#56b4e9", "^"),
        "flex": ("#cc79a7", "D"),
        "flash_torch": ("#e69f00", "v"),
        "flash_triton": ("#d55e00", "P"),
        "block_sparse": ("#009e73", "X"),
        "block_sparse_unpruned": ("#00806a", "h"),
    },
    phases=tuple(PHASES),
    sizes=SIZES,
)


@dataclass(frozen=True)
class Point:
    """What was computed, whatever the method; `other` holds fields that are not known here."""

    phase: str
    batch: int
    heads: int
    kv_heads: int
    Tq: int
    Tk: int
    D: int
    dtype: str
    causal: bool
    pattern: str | None
    other: tuple = ()
    tier: str = field(default="", compare=False)

    @property
    def mask(self) -> str:
        """The mask in words: "full", "causal", "band(256)", "causal band(256)"."""
        words = ["causal"] * self.causal + ([self.pattern] if self.pattern else [])
        return " ".join(words) or "full"

    @property
    def tokens(self) -> str:
        """Queries and keys: "4096", or "512×4096" where they differ."""
        return str(self.Tq) if self.Tq == self.Tk else f"{self.Tq}×{self.Tk}"

    @property
    def square(self) -> bool:
        """As many queries as keys."""
        return self.Tq == self.Tk

    @property
    def setting(self) -> str:
        """What all points of one figure share, in words."""
        parts = [self.dtype, *(f"{name}={value}" for name, value in self.other)]
        if self.heads != self.kv_heads:
            parts.insert(1, f"{self.heads // self.kv_heads} query heads a key head")
        return ", ".join(parts)


@functools.cache
def point_of(case: Case) -> Point | None:
    """The point of a case; None where it is not attention, or lacks a size."""
    fields = {name: value for name, value in case.fields.items() if name not in ("dtype", "ranks")}
    sizes = {name: fields.pop(name, None) for name in SIZES}
    if case.family != FAMILY or not all(isinstance(n, int) and n > 0 for n in sizes.values()):
        return None
    known = {"tier": fields.pop("tier", None) or "", "pattern": fields.pop("pattern", None)}
    causal = bool(fields.pop("causal", False))
    fields["seed"] = case.seed or None
    other = tuple((name, str(value)) for name, value in sorted(fields.items()) if value is not None)
    return Point(case.phase, **sizes, dtype=case.dtype or "", causal=causal, other=other, **known)


def attention(results: Results, phase: str | None = None) -> list[Result]:
    """The results of attention, or those of one phase, in reading order."""
    found = [r for r in results.results if point_of(r.case) and phase in (None, r.case.phase)]
    return sorted(found, key=lambda r: (place_order(point_of(r.case)), order(r)))


def place_order(point: Point) -> tuple:
    """Sorts points: dtype, tier, sizes, mask."""
    tier = TIERS.index(point.tier) if point.tier in TIERS else len(TIERS)
    heads = (point.heads, point.kv_heads, point.batch)
    sizes = (point.Tq * point.Tk, point.Tq, point.D, heads)
    phase = [*PHASES, point.phase].index(point.phase)
    mask = (point.pattern is not None, point.pattern or "", point.causal)
    return (phase, point.dtype, point.other, tier, point.tier, *sizes, mask)


def by_point(results: Iterable[Result]) -> dict[Point, dict[str, Result]]:
    """The methods at each point, in the order given."""
    points: dict[Point, dict[str, Result]] = defaultdict(dict)
    for result in results:
        points[point_of(result.case)][result.case.method] = result
    return dict(points)


def by_setting(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results of each dtype and grouping of heads, the setting with the most first."""
    groups = grouped(results, lambda result: point_of(result.case).setting)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def speed(result: Result, reference: Result) -> Interval:
    """Speed of `result` over that of `reference`: above 1 it is the faster."""
    together = point_of(result.case) == point_of(reference.case)
    paired = together and interleaved([result, reference])
    return ratio(reference.samples, result.samples, paired=paired)


def dense_of(point: Point) -> Point:
    """The point that a pattern's speedup is over: full, or causal where the pattern lets no query
    see a later key, as who uses it would else use a causal kernel.
    """
    causal = point.causal or (point.pattern or "").startswith("causal")
    return replace(point, pattern=None, causal=causal)


def best_dense(result: Result, results: Sequence[Result]) -> Result | None:
    """The fastest kernel without a pattern, whatever its method, at `dense_of` of the result."""
    wanted = dense_of(point_of(result.case))
    return fastest(r for r in results if point_of(r.case) == wanted)


def share(result: Result, *, touched: bool) -> float | None:
    """The share of pairs that attend, or of those in tiles that are touched; None if unknown."""
    point, name = point_of(result.case), "touched_sparsity" if touched else "sparsity"
    if point.pattern is None:
        return dense_share(point)
    value = result.pattern.get(name)
    known = isinstance(value, int | float) and 0 <= value < 1
    return 1 - value if known else None


def dense_share(point: Point) -> float:
    """The share of pairs that attend without a pattern: 1, or those with key <= query."""
    if not point.causal:
        return 1.0
    corner = min(point.Tq, point.Tk)
    pairs = corner * (corner + 1) // 2 + (point.Tq - corner) * point.Tk
    return pairs / (point.Tq * point.Tk)


def ideal(result: Result) -> float | None:
    """How much faster than a dense kernel it would be if time were pairs: of a block list those in
    tiles that it touches.
    """
    left = share(result, touched=result.case.method == SPARSE)
    return dense_share(dense_of(point_of(result.case))) / left if left else None
