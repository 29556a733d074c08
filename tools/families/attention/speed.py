"""Attention kernels side by side: throughput by tier."""

from collections.abc import Sequence

from tools.cases import Result, Results
from tools.drawing import bars, series, style
from tools.drawing.chart import Absent, Axis, Drawing, Line, Panel, Point
from tools.drawing.looks import line_style
from tools.drawing.series import Words
from tools.families.attention.points import (
    NAMING,
    PHASES,
    TIERS,
    attention,
    by_point,
    by_setting,
    point_of,
)
from tools.families.attention.points import (
    Point as Place,
)
from tools.tables import figure

MOST_OF_A_TIER, MOST_WITHOUT_TIERS = 3, 8


def speed_by_tier(results: Results, phase: str) -> list[Drawing]:
    """TFLOP/s of each method, grouped by tier, a panel for each head dimension and mask."""
    found = [r for r in dense(results, phase) if "tflops" in r.rates]
    caption = (
        "Medians; the two products of the forward (and five of the backward) over the pairs "
        "that attend, so a masked pair counts for nothing. Below each group: the tier, and "
        "queries × keys where they differ. Higher is better. Dashed: the rate of a matrix "
        "product on this machine. A method without a bar was not measured there. Of a tier with "
        "many sizes the ends are drawn, and some between at most."
    )
    title = f"Attention, {PHASES[phase]}: throughput by tier"
    words = Words(f"attention_{phase}_by_tier", title, caption)
    groups = groups_of(found, phase)
    options = {"columns": 1, "height": 2.35, "draw": bars.grouped}
    return [
        series.drawn(results, words, text, groups, map(_tiers, panels_of(group)), **options)
        for text, group in groups.items()
    ]


def dense(results: Results, phase: str) -> list[Result]:
    """The results of a phase without a pattern."""
    return [r for r in attention(results, phase) if point_of(r.case).pattern is None]


def groups_of(found: Sequence[Result], phase: str) -> dict[str, list[Result]]:
    """The results of each setting; Absent without any."""
    if not found:
        raise Absent(f"no attention results of {PHASES[phase]} that it could draw")
    return by_setting(found)


def panels_of(group: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """(words, results) for each head dimension and mask."""
    kinds = sorted({(point_of(r.case).D, point_of(r.case).causal) for r in group})
    return [
        (
            f"D = {D}, {'causal' if causal else 'full'}",
            [r for r in group if (point_of(r.case).D, point_of(r.case).causal) == (D, causal)],
        )
        for D, causal in kinds
    ]


def _tiers(panel: tuple[str, list[Result]]) -> Panel:
    """A group of bars for each place; x is the place of the group."""
    title, results = panel
    places, shown = by_point(results), _shown(results)
    names = tuple(_group_name(point) for point in shown)
    rates = [
        r.rates["tflops"] / r.rates["matrix_fraction"]
        for r in results
        if r.rates.get("matrix_fraction", 0) > 0
    ]
    lines = []
    for method in sorted({r.case.method for r in results}, key=NAMING.place):
        here = [(i, places[p][method]) for i, p in enumerate(shown) if method in places[p]]
        if here:
            look = {"color": line_style(here[0][1])["color"]}
            points = tuple(Point(i, r.rates["tflops"]) for i, r in here)
            lines.append(Line(method, points, look))
    y = Axis("TFLOP/s", lambda rate: f"{figure(rate)} TFLOP/s", "bars", max(rates, default=None))
    return Panel(title, tuple(lines), "", y, names)


def _shown(panel: Sequence[Result]) -> list[Place]:
    """The groups of a panel, by their size."""
    tiers = {}
    for point in by_point(panel):
        tiers.setdefault(point.tier, []).append(point)
    most = MOST_OF_A_TIER if len(tiers) > 1 else MOST_WITHOUT_TIERS
    shown = [p for points in tiers.values() for p in style.spread(points, most)]
    return sorted(shown, key=lambda p: (p.Tq * p.Tk, p.Tq, p.heads, p.batch))


def _group_name(point: Place) -> str:
    tier = point.tier if point.tier in TIERS else ""  # "full", say, is of another sweep, no size
    return "\n".join(part for part in (tier, point.tokens) if part)
