"""What a pattern saves: speedup over the best dense kernel against sparsity, beside 1 / (1 - s)."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from tools.cases import Result, Results
from tools.drawing import style, ticks
from tools.drawing.style import Absent, Drawing
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
from tools.families.attention.speed import drawing, groups_of
from tools.families.linear import looks

MOST_PANELS = 4
SERIES = 3  # patterns that make a line
SHARES = (0, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def speedup_vs_sparsity(results: Results, phase: str) -> list[Drawing]:
    """Speedup of pattern kernels over the best dense one, beside the ideal."""
    every = attention(results, phase)
    title = f"Attention, {PHASES[phase]}: speedup against sparsity"
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
    drawings = []
    for text, group in groups_of(sparse, phase).items():
        places = defaultdict(list)
        for result in group:
            p = point_of(result.case)
            places[p.D, p.Tq * p.Tk, p.tokens, p.batch * p.heads, dense_of(p).causal].append(result)
        # The panels with the most patterns, in the order of their sizes.
        kept = sorted(places, key=lambda place: -len(places[place]))[:MOST_PANELS]
        canvas = style.canvas(*style.folded(len(kept), 2), height=4.3)
        for axes, place in style.placed(canvas, sorted(kept)):
            D, _, tokens, heads, causal = place
            words = f"T = {tokens}, D = {D}, {heads} heads in all" + ", over causal" * causal
            axes.set_title(words)
            _speedups(axes, places[place], every)
        for row in canvas.axes:
            row[0].set_ylabel("speedup over the best dense kernel")
        caption = (
            "Time of the fastest kernel without the pattern, at the same sizes and causal where "
            "the pattern is, over that of the method, with 95% intervals. The line is 1 / (1 - s): "
            "time in proportion to the pairs "
            f"that are left. {SPARSE} stands at the sparsity of the tiles that it touches, {FLEX} "
            "at that of the pairs; a thin line joins the two of one pattern. A coloured line joins "
            f"{SERIES} or more patterns that differ in their last number only. The axis is "
            "logarithmic in 1 / (1 - s)."
        )
        if len(kept) < len(places):
            caption += f" The {len(kept)} sizes with the most patterns are drawn."
        figure = style.finish(canvas, title, results, text)
        name = f"attention_{phase}_vs_sparsity"
        drawings.append(drawing(name, text, drawings, (title, caption, figure)))
    return drawings


def _speedups(axes: Axes, group: Sequence[Result], every: Sequence[Result]) -> None:
    spots = defaultdict(list)  # pattern: [(x, y, whether it is ours)]
    series: dict[str, str] = {}
    axes.set_xscale("log")
    for line in style.lines(group):
        line = sorted(line, key=ideal)
        of_method = _series({point_of(r.case).pattern for r in line})
        series |= of_method
        ratios = [speed(r, best_dense(r, every)) for r in line]
        y = np.array([ratio.value for ratio in ratios])
        ends = np.array([[ratio.low, ratio.high] for ratio in ratios]).T
        spread = np.abs(ends - y) * [1 if ratio.enough else 0 for ratio in ratios]
        look = looks.line_style(line[0]) | {"linestyle": "none"}
        axes.errorbar([ideal(r) for r in line], y, yerr=spread, capsize=2.5, elinewidth=1, **look)
        along = defaultdict(list)
        for r, value in zip(line, y, strict=True):
            pattern = point_of(r.case).pattern
            spots[pattern].append((ideal(r), value, r.case.method == SPARSE))
            if pattern in of_method:
                along[of_method[pattern]].append((ideal(r), value))
        for places in along.values():
            axes.plot(*zip(*places, strict=True), color=look["color"], linewidth=1.4, zorder=1.5)
    every_x = [x for spot in spots.values() for x, _, _ in spot]
    every_y = [y for spot in spots.values() for _, y, _ in spot]
    left, right = max(0.93, 0.6 * min(every_x)), 1.3 * max(every_x)
    axes.plot(
        [left, right], [left, right], color=style.FLOOR, linewidth=1.6, label="ideal: 1 / (1 - s)"
    )
    axes.axhline(1, color=style.MUTED, linewidth=1)
    axes.set_xlim(left, right)
    axes.set_ylim(min(0.9, 0.85 * min(every_y)), 1.2 * max(right, *every_y))
    ticks.ratio_axis(axes)
    joined = {"color": style.MUTED, "linewidth": 0.9, "linestyle": (0, (1, 1.6)), "zorder": 1}
    for spot in spots.values():
        axes.plot(*list(zip(*spot, strict=True))[:2], **joined)
    named = {}
    for pattern, spot in spots.items():
        place, name = max(spot, key=lambda s: s[2])[:2], series.get(pattern, pattern)
        named[name] = min(named.get(name, place), place)  # a line has its name where it begins
    _pattern_names(axes, named)
    shown = [s for s in SHARES if left <= 1 / (1 - s) <= right]
    axes.xaxis.set_major_locator(FixedLocator([1 / (1 - s) for s in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * (1 - 1 / x):.4g}%"))
    axes.set_xlabel(f"sparsity s ({SPARSE}: of its tiles, {FLEX}: of the pairs)")


def _series(patterns: set[str]) -> dict[str, str]:
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
    above.xaxis.set_major_locator(FixedLocator(places))
    above.xaxis.set_minor_locator(NullLocator())
    above.xaxis.set_major_formatter(FixedFormatter(names))
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
