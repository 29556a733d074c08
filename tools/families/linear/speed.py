"""How fast: throughput and speed against dense TP, and the map of sizes."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm

from tools.cases import Result, Results, over
from tools.drawing import style, ticks
from tools.drawing.style import Absent, Drawing
from tools.families.linear import looks
from tools.families.linear.hypotheses import SHOCKS, beats_dense
from tools.families.linear.opponents import BETTER, DENSE
from tools.stats import THRESHOLD

REFERENCE = DENSE[0]
WORDS = {
    "forward": "Forward",
    "backward": "Forward and input gradient (weights frozen)",
    "training": "Training step",
}


def phase_vs_size(results: Results, phase: str) -> list[Drawing]:
    """Throughput of a phase against N, a panel for each B."""
    return _phase(results, phase, "N")


def phase_vs_batch(results: Results, phase: str) -> list[Drawing]:
    """Throughput of a phase against B, a panel for each N."""
    return _phase(results, phase, "B")


def speedup_map(results: Results) -> list[Drawing]:
    """Block-Shock's forward against the better dense TP at every N and B, as a coloured table."""
    findings = [f for f in beats_dense(results, THRESHOLD) if f.points and f.against == BETTER]
    if not findings:
        raise Absent(f"needs the forward of {SHOCKS[0]} and of {' or '.join(DENSE)} at one size")
    sizes = sorted({point.N for finding in findings for point in finding.points})
    batches = sorted({point.B for finding in findings for point in finding.points})
    bands, columns = style.folded(len(findings), 3)
    canvas = style.canvas(
        bands, columns, height=0.55 * len(sizes) + 1.0, width=0.85 * len(batches) + 1.8
    )
    for axes, (_, finding) in style.placed(canvas, [(0, finding) for finding in findings]):
        _map(axes, finding, sizes, batches)
    title = "Forward: speed against the better dense TP"
    figure = style.finish(canvas, title, results, "above 1 Block-Shock is faster")
    caption = (
        "Time of the better of dense_tp_row and dense_tp_column, with their usual reduce, over "
        "Block-Shock's time, at each N and B. Violet: Block-Shock is faster, orange: slower. An "
        f"asterisk marks a difference of less than {100 * THRESHOLD:g}%, or one that the samples "
        "do not show with 95% confidence."
    )
    return [Drawing("speedup_map", title, caption, figure)]


def _phase(results: Results, phase: str, x: str) -> list[Drawing]:
    groups = style.settings(results.of(phase), phase)
    drawings, reason = [], Absent("")
    for text, found in groups.items():
        try:
            panels = style.panels_over(found, x)
        except Absent as error:
            reason = error
            continue
        compared = any(map(_is_reference, found))
        bands, columns = style.folded(len(panels))
        each = 2 if compared else 1
        canvas = style.canvas(bands * each, columns, height=2.7)
        for i, (value, panel) in enumerate(panels):
            band, column = divmod(i, columns)
            top = canvas.axes[band * each][column]
            top.set_title(f"{'B' if x == 'N' else 'N'} = {value}")
            _throughput(top, panel, x)
            if compared:
                below = canvas.axes[band * each + 1][column]
                _relative(below, panel, x)
                ticks.size_axis(top, x, [getattr(r.case, x) for r in panel], label=False)
            if column == 0:
                top.set_ylabel("tokens/s")
                if compared:
                    canvas.axes[band * each + 1][0].set_ylabel(f"speed against\n{REFERENCE}")
        _hide_unused(canvas, len(panels), columns, each)
        title = f"{WORDS.get(phase, phase)}: throughput against {x}"
        figure = style.finish(canvas, title, results, text)
        name = style.file_name(f"{phase}_vs_{x}", text, groups)
        drawings.append(Drawing(name, title, _phase_caption(compared), figure))
    if not drawings:
        raise reason
    return drawings


def _phase_caption(compared: bool) -> str:
    caption = (
        "Medians of device time, the slowest rank counts. Higher is better. The grey line"
        " is the limit of the machine for the method that it would let run fastest "
        "(arithmetic, memory and wire at their measured rates, overlapped): no method can"
        " lie above it."
    )
    if compared:
        caption += (
            f" Lower panels: the time of {REFERENCE} over the method's time, with 95% intervals; "
            "above 1 the method is faster."
        )
    return caption


def _throughput(axes: Axes, panel: Sequence[Result], x: str) -> None:
    floors: dict[int, float] = {}
    for line in style.lines(panel):
        axes.plot(
            [getattr(r.case, x) for r in line],
            [r.case.B / r.median for r in line],
            **looks.line_style(line[0]),
        )
        for r in line:
            # One GPU alone has a floor of its own kind; the limit drawn is that of the ranks.
            if "seconds" in r.floor and r.floor["seconds"] > 0 and r.case.method != "dense_single":
                at = getattr(r.case, x)
                floors[at] = max(floors.get(at, 0), r.case.B / r.floor["seconds"])
    if floors:
        where = sorted(floors)
        axes.plot(
            where,
            [floors[at] for at in where],
            color=style.FLOOR,
            linestyle=(0, (4, 2)),
            linewidth=1.4,
            label="limit of the machine (floor)",
            zorder=1,
        )
    ticks.size_axis(axes, x, [getattr(r.case, x) for r in panel])
    ticks.log_axis(axes)


def _relative(axes: Axes, panel: Sequence[Result], x: str) -> None:
    reference = {getattr(r.case, x): r for r in panel if _is_reference(r)}
    axes.axhline(1, color=style.MUTED, linewidth=1)
    for line in style.lines(panel):
        line = [r for r in line if getattr(r.case, x) in reference]
        if not line:
            continue
        times = [over(r, reference[getattr(r.case, x)]) for r in line]
        values = np.array([1 / time.value for time in times])
        ends = np.array([[1 / time.high, 1 / time.low] for time in times]).T
        # With too few samples there is no interval, and none is drawn.
        spread = np.abs(ends - values)
        spread *= [1 if time.enough else 0 for time in times]
        axes.errorbar(
            [getattr(r.case, x) for r in line],
            values,
            yerr=spread,
            capsize=2.5,
            elinewidth=1,
            **looks.line_style(line[0]),
        )
    ticks.size_axis(axes, x, [getattr(r.case, x) for r in panel])
    # Twice as fast and half as fast are equally far from 1.
    ticks.ratio_axis(axes)


def _is_reference(result: Result) -> bool:
    return result.case.method == REFERENCE and not result.unusual


def _map(axes: Axes, finding, sizes: list[int], batches: list[int]) -> None:
    at = {(point.N, point.B): point for point in finding.points}
    speeds = np.full((len(sizes), len(batches)), np.nan)
    for i, n in enumerate(sizes):
        for j, b in enumerate(batches):
            if (n, b) in at:
                speeds[i, j] = np.log2(1 / at[n, b].ratio.value)
    colours = matplotlib.colormaps["PuOr"]
    # Half to twice as fast: the same colour is the same speed everywhere.
    norm = TwoSlopeNorm(0, -1, 1)
    cells = {"edgecolors": style.PAPER, "linewidth": 2}
    axes.pcolormesh(np.ma.masked_invalid(speeds), cmap=colours, norm=norm, **cells)
    for i, n in enumerate(sizes):
        for j, b in enumerate(batches):
            if (n, b) not in at:
                axes.text(j + 0.5, i + 0.5, "–", ha="center", va="center", color=style.MUTED)
                continue
            point = at[n, b]
            mark = "" if point.verdict in ("faster", "slower") else "*"
            dark = abs(norm(speeds[i, j]) - 0.5) > 0.32
            axes.text(
                j + 0.5,
                i + 0.5,
                f"{1 / point.ratio.value:.2f}×{mark}",
                ha="center",
                va="center",
                color="#fefefe" if dark else "#111111",
                fontweight="bold",
            )
    axes.set_title(f"{finding.method}\n{finding.setting}")
    ticks.of_a_map(axes, ("B (tokens)", batches), ("N", sizes))


def _hide_unused(canvas: style.Canvas, used: int, columns: int, each: int) -> None:
    for i in range(used, len(canvas.axes) // each * columns):
        band, column = divmod(i, columns)
        for row in canvas.axes[band * each : band * each + each]:
            row[column].set_visible(False)
