"""What dropped tiles save: speedup of layers over sparsity, and latency of whole models."""

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes

from tools.cases import Result, Results, grouped
from tools.drawing import bars, render, series, style, ticks
from tools.drawing.chart import Absent, Axis, Drawing, Line, Panel, Point
from tools.drawing.looks import line_style
from tools.drawing.series import Words
from tools.families.block_sparse.points import (
    DENSE,
    OURS,
    PHASES,
    SQUARE,
    TORCH,
    by_place,
    of_phase,
    shape,
    speed,
)
from tools.tables import milliseconds

MOST_PANELS = 4
BLOCKS = {16: "#56b4e9", 32: "#0072b2", 64: "#009e73", 128: "#d55e00", 256: "#882255"}
SHARES = (0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
SPEED = Axis("times as fast as dense", "{:.2f}".format, "ratio", 1.0)


def speedup_vs_sparsity(results: Results, phase: str) -> list[Drawing]:
    """Speed over dense against sparsity, a line for each method and tile, beside 1 / (1 − s)."""
    words = Words(
        f"block_sparse_{phase}_vs_sparsity",
        f"Block-sparse {PHASES[phase]}: speed over dense against sparsity",
        "Time of a dense layer over that of the method, in the same rounds, with 95% intervals; a "
        "line for each size of the tiles. Grey: 1 / (1 − s), time in proportion to the tiles that "
        "are kept. The axis is logarithmic in 1 / (1 − s). Higher is better.",
    )
    found = of_phase(results, phase)
    near = {r.id: here for here in by_place(found).values() for r in here}
    compared = [r for r in found if r.case.method != DENSE and speed(r, near[r.id])]
    groups, drawings = grouped(compared, lambda r: r.setting), []
    for text, group in groups.items():
        panels = grouped(group, lambda r: (r.case.N, r.case.K, r.case.B))
        several = [panel for panel in panels.values() if len({r.case.sparsity for r in panel}) > 1]
        # The square that the targets name first, then those with the most lines.
        several.sort(key=lambda p: ((p[0].case.N, p[0].case.K) != SQUARE, -len(p)))
        if several:
            made = [_panel(panel, near) for panel in several[:MOST_PANELS]]
            options = {"height": 3.6, "draw": over_shares}
            drawings.append(series.drawn(results, words, text, groups, made, **options))
    if not drawings:
        raise Absent(f"{PHASES[phase]}: a line needs two sparsities beside dense")
    return drawings


def _panel(panel: Sequence[Result], near: dict[str, Sequence[Result]]) -> Panel:
    lines = []
    ordered = sorted(panel, key=lambda r: (r.line_order, r.case.block))
    for (method, block), one in grouped(ordered, lambda r: (r.case.method, r.case.block)).items():
        points = []
        for result in one:
            ratio = speed(result, near[result.id])
            ends = (ratio.low, ratio.high) if ratio.enough else (None, None)
            points.append(Point(1 / (1 - result.case.sparsity), ratio.value, *ends))
        look = line_style(one[0])
        if method in (OURS, TORCH):  # 2:4 is the same for every tile, and has a colour of its own
            look["color"] = BLOCKS.get(block, look["color"])
        look |= {"linewidth": 2, "markersize": 7}
        look["linestyle"] = "solid" if method == OURS else (0, (2, 1.5))
        lines.append(Line(f"{method}, block {block}", tuple(sorted(points)), look))
    reach = [p.x for line in lines for p in line.points]
    ends = tuple(Point(x, x) for x in (min(reach), max(reach)))
    ideal = {"color": style.FLOOR, "linewidth": 1.6}
    lines.append(Line("ideal: 1 / (1 − s)", ends, ideal, bound=True))
    case = panel[0].case
    return Panel(f"{shape(case)}, {case.B} rows", tuple(lines), "1 / (1 − s) =", SPEED)


def over_shares(axes: Axes, panel: Panel, ids: dict[str, str]) -> dict[str, list]:
    """A panel over 1 / (1 − s), whose axis is written in s."""
    spots = render.lines(axes, Panel("", panel.lines, "step", panel.y), ids)
    values = [p.x for line in panel.lines for p in line.points]
    heights = [p.y for line in panel.lines for p in line.points]
    axes.set_xscale("log")
    axes.set_xlim(0.9 * min(values), 1.1 * max(values))
    axes.set_ylim(0.85 * min(heights), 1.2 * max(heights))
    ticks.ratio_axis(axes)
    shown = [s for s in SHARES if 0.9 * min(values) <= 1 / (1 - s) <= 1.1 * max(values)]
    axes.set_xticks([1 / (1 - s) for s in shown], [f"{s:g}" for s in shown])
    axes.minorticks_off()
    axes.set_xlabel("sparsity s")
    axes.set_ylabel(panel.y.label)
    return spots


def latency(results: Results) -> list[Drawing]:
    """Time of a batch through whole models, a group of bars for each model and sparsity."""
    words = Words(
        "block_sparse_model_latency",
        "Vision transformers with pruned MLPs: time of a batch",
        "Median time of a forward of the whole model, whose MLPs are dense with zeros, hold their "
        "kept tiles, or two of every four entries of them. All other layers are dense. Lower is "
        "better.",
    )
    found = of_phase(results, "model")
    if not found:
        raise Absent("no results of whole models")
    groups = grouped(found, lambda r: r.setting)
    axis = Axis("ms", lambda ms: f"{milliseconds(1e-3 * ms)} ms", "bars")
    return [
        series.drawn(
            results, words, text, groups, [_bars(group, axis)], columns=1, height=3.2,
            draw=bars.grouped,
        )
        for text, group in groups.items()
    ]  # fmt: skip


def _bars(group: Sequence[Result], axis: Axis) -> Panel:
    places = list(by_place(group).values())
    points: dict[str, list[Point]] = {}
    looks = {}
    for i, here in enumerate(places):
        for result in here:
            points.setdefault(result.label, []).append(Point(i, 1e3 * result.median))
            looks[result.label] = {"color": line_style(result)["color"]}
    lines = tuple(Line(label, tuple(found), looks[label]) for label, found in points.items())
    names = tuple(_name(here[0]) for here in places)
    return Panel("", lines, "", axis, names)


def _name(result: Result) -> str:
    case = result.case
    return f"{shape(case)}\n{case.B} images\ns = {case.sparsity:g}"


FIGURES = {
    "block_sparse_forward_vs_sparsity": partial(speedup_vs_sparsity, phase="forward"),
    "block_sparse_model_latency": latency,
    "block_sparse_backward_vs_sparsity": partial(speedup_vs_sparsity, phase="backward"),
}
