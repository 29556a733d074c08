"""What a pattern saves: speedup over the best dense kernel against sparsity, beside 1 / (1 - s)."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes

from tools.cases import Result, Results, grouped
from tools.drawing import render, series, style, ticks
from tools.drawing.chart import Absent, Axis, Drawing, Line, Panel, Point
from tools.drawing.series import Words
from tools.families.attention.points import (
    FLEX,
    PHASES,
    SPARSE,
    attention,
    best_dense,
    dense_of,
    ideal,
    point_of,
    speed,
)
from tools.families.attention.speed import groups_of

MOST_PANELS = 4
SERIES = 3  # patterns that make a line
SHARES = (0, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def speedup_vs_sparsity(results: Results, phase: str) -> list[Drawing]:
    """Speedup of pattern kernels over the best dense one, beside the ideal."""
    every = attention(results, phase)
    sparse = [
        r
        for r in every
        if r.case.method in (SPARSE, FLEX)
        and ideal(r)
        and point_of(r.case).pattern
        and best_dense(r, every)
    ]
    if not sparse:
        raise Absent(f"needs {SPARSE} or {FLEX} with a pattern, and a dense kernel at its sizes")
    caption = (
        "Time of the fastest kernel without the pattern, at the same sizes and causal where "
        "the pattern is, over that of the method, with 95% intervals. The line is 1 / (1 - s): "
        f"time in proportion to the pairs that are left. {SPARSE} stands at the sparsity of the "
        f"tiles that it touches, {FLEX} at that of the pairs; a thin line joins the two of one "
        f"pattern. A coloured line joins {SERIES} or more patterns that differ in their last "
        "number only. The axis is logarithmic in 1 / (1 - s). The sizes with the most patterns "
        "are drawn."
    )
    title = f"Attention, {PHASES[phase]}: speedup against sparsity"
    words = Words(f"attention_{phase}_vs_sparsity", title, caption)
    groups, drawings = groups_of(sparse, phase), []
    for text, group in groups.items():
        places = grouped(group, _place)
        # The panels with the most patterns, in the order of their sizes.
        kept = sorted(places, key=lambda place: -len(places[place]))[:MOST_PANELS]
        panels = [_panel(place, places[place], every) for place in sorted(kept)]
        options = {"height": 4.3, "draw": _speedups}
        drawings.append(series.drawn(results, words, text, groups, panels, **options))
    return drawings


def _place(result: Result) -> tuple:
    p = point_of(result.case)
    return (p.D, p.Tq * p.Tk, p.tokens, p.batch * p.heads, dense_of(p).causal)


def _panel(place: tuple, group: Sequence[Result], every: Sequence[Result]) -> Panel:
    D, _, tokens, heads, causal = place
    title = f"T = {tokens}, D = {D}, {heads} heads in all" + ", over causal" * causal

    def value(result: Result) -> Point:
        ratio = speed(result, best_dense(result, every))
        ends = (ratio.low, ratio.high) if ratio.enough else (None, None)
        return Point(0, ratio.value, *ends, point_of(result.case).pattern)

    lines = [series.line(one, ideal, value) for one in style.lines(group)]
    reach = [p.x for line in lines for p in line.points]
    ends = tuple(Point(x, x) for x in (max(0.93, 0.6 * min(reach)), 1.3 * max(reach)))
    lines.append(Line("ideal: 1 / (1 - s)", ends, {"color": style.FLOOR, "linewidth": 1.6}))
    y = Axis("speedup over the best dense kernel", "{:.2f}".format, "ratio", 1)
    return Panel(title, tuple(lines), "1 / (1 - s) =", y)


def _speedups(axes: Axes, panel: Panel, ids: dict[str, str]) -> dict[str, list]:
    """Draws a panel: methods without lines, what joins their points, and the patterns' names."""
    *methods, bound = panel.lines
    patterns = list(dict.fromkeys(p.note for line in methods for p in line.points))
    names = _series(patterns)
    loose = [Line(m.label, m.points, m.look | {"linestyle": "none"}) for m in methods]
    spots = render.lines(axes, Panel("", (*loose, bound), "step", panel.y), ids)
    for line in methods:
        along = defaultdict(list)
        for p in line.points:
            if p.note in names:
                along[names[p.note]].append((p.x, p.y))
        for i, places in enumerate(along.values()):
            look = {"color": line.look["color"], "linewidth": 1.4, "zorder": 1.5}
            axes.plot(*zip(*places, strict=True), gid=f"{ids[line.label]}-along{i}", **look)
    (left, _), (right, _) = ((p.x, p.y) for p in bound.points)
    every = [p.y for line in methods for p in line.points]
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(min(0.9, 0.85 * min(every)), 1.2 * max(right, *every))
    ticks.ratio_axis(axes)
    joined = {"color": style.MUTED, "linewidth": 0.9, "linestyle": (0, (1, 1.6)), "zorder": 1}
    named: dict[str, tuple] = {}
    for pattern in patterns:
        spot = [
            (p.x, p.y, m.label == SPARSE) for m in methods for p in m.points if p.note == pattern
        ]
        axes.plot(*list(zip(*spot, strict=True))[:2], **joined)
        place, name = max(spot, key=lambda s: s[2])[:2], names.get(pattern, pattern)
        named[name] = min(named.get(name, place), place)  # a line has its name where it begins
    _pattern_names(axes, named)
    shown = [s for s in SHARES if left <= 1 / (1 - s) <= right]
    axes.set_xticks([1 / (1 - s) for s in shown], [f"{100 * s:.4g}%" for s in shown])
    axes.minorticks_off()
    axes.set_xlabel(f"sparsity s ({SPARSE}: of its tiles, {FLEX}: of the pairs)")
    axes.set_ylabel(panel.y.label)
    return spots


def _series(patterns: Iterable[str]) -> dict[str, str]:
    """Pattern: the name of its line, "band(…)" for all bands, where there are enough of them."""
    lines = defaultdict(list)
    for pattern in patterns:
        lines[re.sub(r"[^(,]+\)$", "…)", pattern)].append(pattern)
    return {p: name for name, line in lines.items() if len(line) >= SERIES for p in line}


def _pattern_names(axes: Axes, spots: dict[str, tuple]) -> None:
    """Names above the panel, pushed apart, each with a thin line down to its point."""
    names = sorted(spots, key=lambda name: spots[name])
    (low, high), top = np.log(axes.get_xlim()), axes.get_ylim()[1]
    at = [(np.log(spots[name][0]) - low) / (high - low) for name in names]
    # The least distance of two slanted names, as a share of the axis.
    at = _pushed(at, min(0.07, 1 / max(1, len(names) - 1)))
    places = np.exp(low + np.array(at) * (high - low))
    for name, x in zip(names, places, strict=True):
        ends = [x, spots[name][0]], [top, spots[name][1]]
        axes.plot(*ends, color=style.MUTED, linewidth=0.6, alpha=0.6, zorder=0.9)
    above = axes.secondary_xaxis("top")
    above.set_ticks(places, names)
    above.minorticks_off()
    above.tick_params(length=0, pad=2, labelsize=8.5, labelrotation=40)
    for text in above.get_xticklabels():
        text.set(ha="left", va="bottom", rotation_mode="anchor")
    above.spines["top"].set_visible(False)


def _pushed(at: list[float], step: float) -> list[float]:
    """Sorted places moved apart to `step`, within 0 and 1, as little as a sweep each way needs."""
    found = list(at)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + step)
    top = 1.0
    for i in reversed(range(len(found))):
        found[i] = min(found[i], top)
        top = found[i] - step
    return found
