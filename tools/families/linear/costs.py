"""What it costs beside time: memory, time per byte of weight, and error."""

from matplotlib.axes import Axes

from tools.cases import Result, Results
from tools.drawing import style, ticks
from tools.drawing.style import Absent, Drawing
from tools.families.linear import looks
from tools.families.linear.opponents import way

MEASURES = {
    "relative": "relative error\n(Frobenius)",
    "max": "largest\nabsolute error",
    "mean": "mean\nabsolute error",
    "ratio": "relative error over\nthat of plain dense",
}
TENSORS = {
    "output": "output",
    "grad_input": "gradient of the input",
    "grad_weight": "gradient of the weight",
    "grad_bias": "gradient of the bias",
}


def memory_vs_size(results: Results) -> list[Drawing]:
    """Weight bytes and peak memory per rank against N, in bytes and in MiB or GiB."""
    found = [r for r in results.of("forward") if "weight_bytes" in r.memory]
    groups = style.settings(found, "forward results with memory")
    peak = any("peak_bytes" in r.memory for r in found)
    title = "Memory of a rank: weights" + (", and peak of the forward" if peak else "")
    drawings = []
    for text, group in groups.items():
        panels = style.panels_over(group, "N")
        peaks = [(b, [r for r in p if "peak_bytes" in r.memory]) for b, p in panels]
        peaks = [(b, panel) for b, panel in peaks if panel]
        bands, columns = style.folded(1 + len(peaks))
        canvas = style.canvas(bands, columns, sharey=True)
        axes_ = [one for row in canvas.axes for one in row]
        _memory(axes_[0], panels[0][1], "weight_bytes")
        axes_[0].set_title("weights")
        for axes, (b, panel) in zip(axes_[1:], peaks, strict=False):
            axes.set_title(f"peak, B = {b}")
            _memory(axes, panel, "peak_bytes")
        for unused in axes_[1 + len(peaks) :]:
            unused.set_visible(False)
        unit = _both_units(canvas)
        figure = style.finish(canvas, title, results, text)
        caption = (
            "The rank that holds the most counts. Left axis: bytes; right axis: the same in "
            f"{unit}. Weights: what the tensors hold. "
        )
        if any("weight_bytes_estimated" in r.memory for r in group):
            caption += (
                "Ring: the estimate from N, K and the format; where the marker lies off it, a "
                "rank holds more than the format needs, such as a mask. "
            )
        if peaks:
            caption += "Peak: the most that was allocated at once."
        else:
            caption += "This device does not say how much was allocated at most."
        name = style.file_name("memory_vs_N", text, groups)
        drawings.append(Drawing(name, title, caption, figure))
    return drawings


def time_per_weight_byte_vs_size(results: Results) -> list[Drawing]:
    """Forward time over the bytes of weight that a rank holds, against N."""
    found = [r for r in results.of("forward") if r.memory.get("weight_bytes", 0) > 0]
    title = "Forward time per byte of weight"
    caption = (
        "Median forward time over the weight bytes of a rank. Lower is better, as long as"
        " bytes are what the time is spent on: a method that holds more bytes for the "
        "same layer looks better here than it is."
    )
    return _simple(
        results,
        found,
        ("forward_per_weight_byte_vs_N", title, caption),
        "ps per weight byte",
        lambda r: 1e12 * r.median / r.memory["weight_bytes"],
    )


def quality_speed_vs_size(results: Results) -> list[Drawing]:
    """(1 / forward ms) / (1 + mean absolute error), against N."""
    errors = {_place(r): r.errors["output"]["mean"] for r in _with_mean(results, "correctness")}
    errors |= {_place(r): r.errors["output"]["mean"] for r in _with_mean(results, "forward")}
    found = [r for r in results.of("forward") if _place(r) in errors]
    if results.of("forward") and not found:
        raise Absent("no forward result has a mean absolute error of its output")
    title = "Forward: quality-adjusted speed"
    caption = (
        "(1 / forward time in ms) / (1 + mean absolute error of the output). Higher is "
        "better. With errors far below 1 it differs little from plain speed: errors are "
        "judged in their own plot."
    )
    return _simple(
        results,
        found,
        ("quality_adjusted_speed_vs_N", title, caption),
        "(1/ms) / (1 + error)",
        lambda r: 1e-3 / r.median / (1 + errors[_place(r)]),
    )


def errors_vs_size(results: Results) -> list[Drawing]:
    """Relative, largest and mean error of each tensor against N, at the largest B measured most."""
    found = [r for p in ("correctness", "forward") for r in results.of(p) if r.errors]
    phase = found[0].case.phase if found else "correctness"
    groups = style.settings([r for r in found if r.case.phase == phase], "correctness")
    title = "Error against the truth"
    drawings = []
    for text, group in groups.items():
        # Errors hardly depend on B, so one B is drawn; the tables have the others.
        b, panel = max(style.panels_over(group, "N"), key=lambda item: (len(item[1]), item[0]))
        tensors = [t for t in TENSORS if any(t in r.errors for r in panel)]
        measures = [m for m in MEASURES if any(m in e for r in panel for e in r.errors.values())]
        canvas = style.canvas(len(measures), len(tensors), height=2.1, sharex="col", sharey="row")
        for row, measure in zip(canvas.axes, measures, strict=True):
            row[0].set_ylabel(MEASURES[measure])
            for axes, tensor in zip(row, tensors, strict=True):
                if measure == measures[0]:
                    axes.set_title(TENSORS[tensor])
                _errors(axes, panel, tensor, measure)
                sizes = [r.case.N for r in panel]
                ticks.size_axis(axes, "N", sizes, label=measure == measures[-1])
            low, high = row[0].get_ylim()
            if measure != "ratio" and low > 0 and high > 4 * low:
                ticks.log_axis(row[0], lambda value: f"{value:g}")
            else:
                row[0].set_ylim(0, 1.08 * high)
        figure = style.finish(canvas, title, results, f"{text}, B = {b}")
        caption = (
            "The truth is the dense product in float64, or accumulated in float32 for large "
            "N. Last row: the error over that of plain dense in the same dtype, with the "
            "limit that a method must keep to pass (rounding two partial sums and their sum "
            "costs √2)."
        )
        name = style.file_name("errors_vs_N", text, groups)
        drawings.append(Drawing(name, title, caption, figure))
    return drawings


def _errors(axes: Axes, panel: list[Result], tensor: str, measure: str) -> None:
    limits = {}
    lines = style.lines(panel)
    for i, line in enumerate(lines):
        line = [r for r in line if measure in r.errors.get(tensor, {})]
        if not line:
            continue
        values = [r.errors[tensor][measure] for r in line]
        # A log axis has no zero: an exact result is drawn in the ratio alone.
        if measure == "ratio" or all(value > 0 for value in values):
            sizes = [r.case.N * style.beside(i, len(lines)) for r in line]
            axes.plot(sizes, values, **looks.line_style(line[0]))
        limits |= {r.case.N: r.errors[tensor].get("limit") for r in line}
    limits = {n: limit for n, limit in limits.items() if limit is not None}
    if measure == "ratio" and limits:
        where = sorted(limits)
        axes.plot(
            where,
            [limits[n] for n in where],
            color=style.FLOOR,
            linestyle=(0, (4, 2)),
            label="limit to pass",
        )


def _memory(axes: Axes, panel: list[Result], key: str) -> None:
    for line in style.lines(panel):
        line = [r for r in line if key in r.memory]
        look = looks.line_style(line[0])
        axes.plot([r.case.N for r in line], [r.memory[key] for r in line], **look)
        estimated = [r for r in line if "weight_bytes_estimated" in r.memory]
        if key == "weight_bytes" and estimated:
            axes.plot(
                [r.case.N for r in estimated],
                [r.memory["weight_bytes_estimated"] for r in estimated],
                linestyle="none",
                marker="o",
                markersize=13,
                markerfacecolor="none",
                markeredgecolor=look["color"],
            )
    ticks.size_axis(axes, "N", [r.case.N for r in panel])


def _both_units(canvas: style.Canvas) -> str:
    """Draws the second axis and gives its unit."""
    first = canvas.axes[0][0]
    ticks.log_axis(first, lambda value: f"{value:.0e}".replace("e+0", "e").replace("e+", "e"))
    low, high = first.get_ylim()
    unit, scale = ("GiB", 2**30) if high >= 2**27 else ("MiB", 2**20)
    for row in canvas.axes:
        row[0].set_ylabel("bytes")
        last = [axes for axes in row if axes.get_visible()][-1]
        right = last.secondary_yaxis("right", functions=(lambda v: v / scale, lambda v: v * scale))
        right.set_ylabel(unit, color=style.INK)
        ticks.log_axis(right, lambda value: f"{value:g}", (low / scale, high / scale))
        right.tick_params(colors=style.MUTED, labelcolor=style.INK)
    return unit


def _simple(results: Results, found: list[Result], words, label: str, value) -> list[Drawing]:
    """One line per method against N, a panel for each B."""
    name, title, caption = words
    groups = style.settings(found, "forward")
    drawings = []
    for text, group in groups.items():
        panels = style.panels_over(group, "N")
        bands, columns = style.folded(len(panels))
        canvas = style.canvas(bands, columns)
        axes_ = [one for row in canvas.axes for one in row]
        for unused in axes_[len(panels) :]:
            unused.set_visible(False)
        for axes, (b, panel) in zip(axes_, panels, strict=False):
            axes.set_title(f"B = {b}")
            for line in style.lines(panel):
                axes.plot(
                    [r.case.N for r in line], [value(r) for r in line], **looks.line_style(line[0])
                )
            ticks.size_axis(axes, "N", [r.case.N for r in panel])
            ticks.log_axis(axes)
        for row in canvas.axes:
            row[0].set_ylabel(label)
        figure = style.finish(canvas, title, results, text)
        drawings.append(Drawing(style.file_name(name, text, groups), title, caption, figure))
    return drawings


def _with_mean(results: Results, phase: str) -> list[Result]:
    return [r for r in results.of(phase) if "mean" in r.errors.get("output", {})]


def _place(result: Result) -> tuple:
    case = result.case
    return (*way(result), case.N, case.K, case.B, case.dtype, case.bias, case.input)
