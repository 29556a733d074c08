"""Attention kernels side by side: throughput by tier, and speed against the best peer by size."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm

from tools.cases import Result, Results, method_order
from tools.drawing import style, ticks
from tools.drawing.style import Absent, Drawing
from tools.families.attention.points import (
    OURS,
    PEERS,
    PHASES,
    TIERS,
    Point,
    attention,
    by_point,
    by_setting,
    fastest,
    point_of,
    speed,
)
from tools.families.linear import looks
from tools.stats import THRESHOLD, Interval, judge

MOST_OF_A_TIER, MOST_WITHOUT_TIERS = 3, 8


def speed_by_tier(results: Results, phase: str) -> list[Drawing]:
    """TFLOP/s of each method, grouped by tier, a panel for each head dimension and mask."""
    found = [r for r in dense(results, phase) if "tflops" in r.rates]
    title = f"Attention, {PHASES[phase]}: throughput by tier"
    drawings = []
    for text, group in groups_of(found, phase).items():
        panels = panels_of(group)
        groups = max(len(_shown(panel)) for _, panel in panels)
        canvas = style.canvas(len(panels), 1, height=2.35, width=0.9 * groups)
        left_out = False
        for axes, (words, panel) in style.placed(canvas, panels):
            axes.set_title(words)
            left_out |= _bars(axes, panel)
            axes.set_ylabel("TFLOP/s")
        caption = (
            "Medians; the two products of the forward (and five of the backward) over the pairs "
            "that attend, so a masked pair counts for nothing. Below each group: the tier, and "
            "queries × keys where they differ. Higher is better. Dashed: the rate of a matrix "
            "product on this machine. A method without a bar was not measured there."
        )
        if left_out:
            caption += " Of a tier with many sizes the ends are drawn, and some between at most."
        figure = style.finish(canvas, title, results, text)
        drawings.append(
            drawing(f"attention_{phase}_by_tier", text, drawings, (title, caption, figure))
        )
    return drawings


def speed_map(results: Results, phase: str) -> list[Drawing]:
    """Speed of our kernel over the best peer at each number of queries and keys."""
    found = dense(results, phase)
    drawings = []
    title = f"Attention, {PHASES[phase]}: {OURS} against the best peer"
    for text, group in groups_of(found, phase).items():
        panels = [(words, _cells(panel)) for words, panel in panels_of(group)]
        panels = [(words, cells) for words, cells in panels if len(cells) > 1]
        if not panels:
            continue
        rows, columns = (max(len(_sizes(cells, i)) for _, cells in panels) for i in (0, 1))
        bands, across = style.folded(len(panels), 2)
        width = 0.62 * columns + 1.2
        canvas = style.canvas(bands, across, height=0.52 * rows + 1.1, width=width)
        for axes, (words, cells) in style.placed(canvas, panels):
            axes.set_title(words)
            _map(axes, cells)
        caption = (
            f"Bold: speed of {OURS} over that of the fastest of {', '.join(PEERS)} at the same "
            f"point; below it, the TFLOP/s of {OURS}. Violet: {OURS} is faster, orange: slower. An "
            f"asterisk marks a difference of less than {100 * THRESHOLD:g}%, or one that the "
            "samples do not show with 95% confidence. Where several batches were measured, the "
            "one with the most heads in all is shown."
        )
        figure = style.finish(canvas, title, results, text)
        drawings.append(drawing(f"attention_{phase}_map", text, drawings, (title, caption, figure)))
    if not drawings:
        raise Absent(f"needs {OURS} and one of {', '.join(PEERS)} at two sizes")
    return drawings


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


def drawing(name: str, text: str, before: list, parts: tuple) -> Drawing:
    """A Drawing; the first setting has the plain name."""
    title, caption, figure = parts
    first = text if not before else None
    return Drawing(style.file_name(name, text, [first]), title, caption, figure)


def _shown(panel: Sequence[Result]) -> list[Point]:
    """The groups of a panel, by their size."""
    tiers = {}
    for point in by_point(panel):
        tiers.setdefault(point.tier, []).append(point)
    most = MOST_OF_A_TIER if len(tiers) > 1 else MOST_WITHOUT_TIERS
    shown = [p for points in tiers.values() for p in style.spread(points, most)]
    return sorted(shown, key=lambda p: (p.Tq * p.Tk, p.Tq, p.heads, p.batch))


def _bars(axes: Axes, panel: Sequence[Result]) -> bool:
    """Draws the groups of a panel; whether some points were left out."""
    places, shown = by_point(panel), _shown(panel)
    width = 0.84 / max(len(places[point]) for point in shown)
    for x, point in enumerate(shown):
        methods = sorted(places[point], key=method_order)
        for i, method in enumerate(methods):
            axes.bar(
                x + (i - (len(methods) - 1) / 2) * width,
                places[point][method].rates["tflops"],
                width=0.92 * width,
                color=looks.line_style(places[point][method])["color"],
                label=method,
            )
    rates = [
        r.rates["tflops"] / r.rates["matrix_fraction"]
        for r in panel
        if r.rates.get("matrix_fraction", 0) > 0
    ]
    if rates:
        axes.axhline(
            max(rates), color=style.FLOOR, linestyle=(0, (4, 2)), label="matrix product", zorder=1
        )
    names = [_group_name(point) for point in shown]
    axes.set_xticks(range(len(shown)), names, fontsize=9 if len(shown) < 8 else 7.5)
    axes.set_xlim(-0.6, len(shown) - 0.4)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    return len(shown) < len(places)


def _group_name(point: Point) -> str:
    tier = point.tier if point.tier in TIERS else ""  # "full", say, is of another sweep, no size
    return "\n".join(part for part in (tier, point.tokens) if part)


def _cells(panel: Sequence[Result]) -> dict[tuple[int, int], tuple[Interval, Result]]:
    """(queries, keys): the ratio, and our result."""
    cells = {}
    # The batch with the most heads comes last, and stays.
    for point, methods in sorted(
        by_point(panel).items(), key=lambda item: item[0].batch * item[0].heads
    ):
        peer = fastest(methods[name] for name in PEERS if name in methods)
        if peer and OURS in methods:
            cells[point.Tq, point.Tk] = (speed(methods[OURS], peer), methods[OURS])
    return cells


def _sizes(cells: dict, side: int) -> list[int]:
    """Of the queries (0) or the keys (1)."""
    return sorted({size[side] for size in cells})


def _map(axes: Axes, cells: dict) -> None:
    queries, keys = _sizes(cells, 0), _sizes(cells, 1)
    speeds = np.full((len(queries), len(keys)), np.nan)
    for (q, k), (ratio, _) in cells.items():
        speeds[queries.index(q), keys.index(k)] = np.log2(ratio.value)
    # Half to twice as fast, as in the map of the linear layers.
    norm = TwoSlopeNorm(0, -1, 1)
    style_of = {"edgecolors": style.PAPER, "linewidth": 2}
    axes.pcolormesh(
        np.ma.masked_invalid(speeds), cmap=matplotlib.colormaps["PuOr"], norm=norm, **style_of
    )
    for i, q in enumerate(queries):
        for j, k in enumerate(keys):
            middle = {"ha": "center", "va": "center"}
            if (q, k) not in cells:
                axes.text(j + 0.5, i + 0.5, "–", color=style.MUTED, **middle)
                continue
            ratio, ours = cells[q, k]
            mark = "" if judge(ratio) in ("faster", "slower") else "*"
            dark = abs(norm(speeds[i, j]) - 0.5) > 0.32
            colour = "#fefefe" if dark else "#111111"
            axes.text(
                j + 0.5,
                i + 0.62,
                f"{ratio.value:.2f}×{mark}",
                color=colour,
                weight="bold",
                **middle,
            )
            if "tflops" in ours.rates:
                small = f"{ours.rates['tflops']:.3g}"
                axes.text(j + 0.5, i + 0.26, small, color=colour, fontsize=8, **middle)
    ticks.of_a_map(axes, ("keys", keys), ("queries", queries))
