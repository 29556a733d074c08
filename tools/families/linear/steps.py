"""What happens within a training step, and over the steps of a drift run."""

from matplotlib.axes import Axes

from tools.cases import Result, Results
from tools.drawing import style
from tools.drawing.style import Drawing
from tools.families.linear import looks
from tools.families.linear.opponents import way

SEGMENTS = {
    "forward": "#0072b2",
    "backward": "#56b4e9",
    "communication": "#e69f00",
    "compress": "#d55e00",
    "optimizer": "#8a5fa8",
    "other": "#c3c8ce",
}
COMMUNICATION = ("allreduce", "allgather", "layout_fix")
MOST = 3


def step_breakdown(results: Results) -> list[Drawing]:
    """Stacked bars of a training step, a panel for each N and B."""
    found = [r for r in results.of("training") if "total" in r.regions]
    groups = style.settings(found, "instrumented training")
    title = "Training step: where the time goes"
    ahead = {_place(r): r for r in results.of("forward") if r.regions}
    drawings = []
    for text, group in groups.items():
        sizes = style.spread(sorted({r.case.N for r in group}), MOST)
        batches = style.spread(sorted({r.case.B for r in group}), MOST)
        labels = [line[0].label for line in style.lines(group)]
        canvas = style.canvas(
            len(sizes), len(batches), height=0.27 * len(labels) + 0.95, sharey=True
        )
        for row, n in zip(canvas.axes, sizes, strict=True):
            for axes, b in zip(row, batches, strict=True):
                here = {r.label: r for r in group if (n, b) == (r.case.N, r.case.B)}
                _bars(axes, here, labels, ahead)
                axes.set_title(f"N = {n}, B = {b}")
                if n == sizes[-1]:
                    axes.set_xlabel("ms")
        figure = style.finish(canvas, title, results, text)
        caption = (
            "Averages of the instrumented pass. Communication is the collectives and "
            "the copies made for their layout; it happens within forward and backward, and is taken"
            " out of them. The diamond is the median step that was reported, measured without"
            " instruments."
        )
        if len(sizes) * len(batches) < len({(r.case.N, r.case.B) for r in group}):
            caption += " The smallest, a middle and the largest sizes are drawn."
        name = style.file_name("step_breakdown", text, groups)
        drawings.append(Drawing(name, title, caption, figure))
    return drawings


def drift_by_step(results: Results) -> list[Drawing]:
    """Error after each of T forward-only steps, for the method and for plain dense."""
    found = [r for r in results.of("drift") if r.drift.get("method")]
    groups = style.settings(found, "drift")
    title = "Drift: error after repeated forward steps"
    drawings = []
    for text, group in groups.items():
        places = sorted({(r.case.N, r.case.B) for r in group})
        shown = places if len(places) <= 9 else style.spread(places, 9)
        bands, columns = style.folded(len(shown), 3)
        canvas = style.canvas(bands, columns)
        axes_ = [one for row in canvas.axes for one in row]
        for unused in axes_[len(shown) :]:
            unused.set_visible(False)
        for axes, (n, b) in zip(axes_, shown, strict=False):
            axes.set_title(f"N = {n}, B = {b}")
            axes.set_xlabel("step")
            _drift(axes, [r for r in group if (n, b) == (r.case.N, r.case.B)])
        for row in canvas.axes:
            row[0].set_ylabel("relative error")
        figure = style.finish(canvas, title, results, text)
        caption = (
            "The output is normalised and fed back as the next input; the error is against "
            "the same steps in the reference. Dashed: plain dense in the same dtype, which "
            "drifts as well."
        )
        name = style.file_name("drift", text, groups)
        drawings.append(Drawing(name, title, caption, figure))
    return drawings


def segments(result: Result, forward: Result | None = None) -> dict[str, float]:
    """Seconds of a step by segment; they add up to the instrumented total.

    forward: the same line's result of the forward phase, which says what share of a forward is
    communication. Without it, and where that share would leave one of the two passes without any
    time of its own, both give it up in proportion to their lengths.
    """
    times = {name: region.avg for name, region in result.regions.items()}
    ahead, back = times.get("forward", 0.0), times.get("backward", 0.0)
    wire = min(_communication(result), ahead + back)
    of_forward = wire * ahead / (ahead + back) if ahead + back else 0.0
    if forward is not None and "forward" in forward.regions:
        share = _communication(forward) / max(forward.regions["forward"].avg, 1e-12)
        if share < 1 and 0 <= wire - share * ahead < back:
            of_forward = share * ahead
    parts = {
        "forward": ahead - of_forward,
        "backward": back - (wire - of_forward),
        "communication": wire,
        "compress": times.get("compress", 0.0),
        "optimizer": times.get("optimizer", 0.0),
    }
    parts["other"] = max(0.0, times.get("total", 0.0) - sum(parts.values()))
    return parts


def _communication(result: Result) -> float:
    return sum(result.regions[name].avg for name in COMMUNICATION if name in result.regions)


def _bars(axes: Axes, here: dict[str, Result], labels: list[str], ahead: dict) -> None:
    for y, label in enumerate(labels):
        if label not in here:
            axes.text(0, y, " not measured", va="center", color=style.MUTED, fontsize=8)
            continue
        left = 0.0
        for name, value in segments(here[label], ahead.get(_place(here[label]))).items():
            axes.barh(
                y,
                1e3 * value,
                left=left,
                height=0.72,
                color=SEGMENTS[name],
                edgecolor=style.PAPER,
                linewidth=0.5,
                label=name,
            )
            left += 1e3 * value
        axes.plot(
            [1e3 * here[label].median],
            [y],
            marker="d",
            linestyle="none",
            color=style.INK,
            markersize=6,
            label="reported step",
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    longest = [max(r.median, r.regions["total"].avg) for r in here.values()]
    axes.set_xlim(0, 1.04e3 * max(longest, default=1e-3))


def _drift(axes: Axes, found: list[Result]) -> None:
    for line in style.lines(found):
        values = line[0].drift["method"]
        steps = range(1, len(values) + 1)
        every = max(1, len(values) // 6)
        axes.plot(steps, values, markevery=every, **looks.line_style(line[0]))
    dense = next((r.drift["dense"] for r in found if r.drift.get("dense")), ())
    if dense:
        axes.plot(
            range(1, len(dense) + 1),
            dense,
            color=style.INK,
            linestyle=(0, (4, 2)),
            linewidth=1.4,
            label="plain dense, same dtype",
        )
    axes.set_ylim(bottom=0)


def _place(result: Result) -> tuple:
    case = result.case
    return (*way(result), case.N, case.K, case.B, case.dtype, case.bias, case.input)
