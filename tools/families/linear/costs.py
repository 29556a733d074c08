"""What it costs beside time: memory, time per byte of weight, and error."""

from tools.cases import Result, Results
from tools.drawing import series, style
from tools.drawing.chart import Absent, Axis, Drawing, Line, Point
from tools.drawing.series import Sketch, Words
from tools.families.linear.opponents import same_call
from tools.families.linear.speed import few
from tools.tables import figure, size

MEASURES = {
    "relative": "relative error (Frobenius)",
    "max": "largest absolute error",
    "mean": "mean absolute error",
    "ratio": "error over plain dense",
}
TENSORS = {
    "output": "output",
    "grad_input": "gradient of the input",
    "grad_weight": "gradient of the weight",
    "grad_bias": "gradient of the bias",
}


def memory_vs_size(results: Results) -> list[Drawing]:
    """Weight bytes and peak memory per rank against N, a panel for each B of the peak."""
    found = [r for r in results.of("forward") if "weight_bytes" in r.memory]
    peak = any("peak_bytes" in r.memory for r in found)
    title = "Memory of a rank: weights" + (", and peak of the forward" if peak else "")
    caption = "The rank that holds the most counts. Weights: what the tensors hold. "
    if any("weight_bytes_estimated" in r.memory for r in found):
        caption += (
            "Ring: the estimate from N, K and the format; where the marker lies off it, a rank "
            "holds more than the format needs, such as a mask. "
        )
    told = "Peak: the most that was allocated at once."
    caption += told if peak else "This device does not say how much was allocated at most."
    words, y = Words("memory_vs_N", title, caption), Axis("memory of a rank", _bytes, "bytes")
    ring = {"linestyle": "none", "marker": "o", "markersize": 13, "color": style.MUTED}
    ring |= {"markerfacecolor": "none", "markeredgecolor": style.MUTED}

    def held(name: str) -> series.Value:
        return lambda result: result.memory.get(name)

    groups = series.by_size(few(found), "forward with memory figures", most=3)
    for panels in groups.values():
        estimates = {
            (r.case.N, r.memory["weight_bytes_estimated"])
            for r in panels[0].results
            if "weight_bytes_estimated" in r.memory
        }
        points = tuple(Point(*estimate) for estimate in sorted(estimates))
        rings = [Line("estimate of the weights", points, ring)] if points else []
        weights = panels[0]._replace(title="weights", value=held("weight_bytes"), extra=rings)
        peaks = [p._replace(title=f"peak, {p.title}", value=held("peak_bytes")) for p in panels]
        panels[:] = [weights, *peaks]
    return series.charts(results, groups, words, y)


def time_per_weight_byte_vs_size(results: Results) -> list[Drawing]:
    """Forward time over the bytes of weight that a rank holds, against N."""
    found = [r for r in results.of("forward") if r.memory.get("weight_bytes", 0) > 0]
    caption = (
        "Median forward time over the weight bytes of a rank. Lower is better, as long as bytes "
        "are what the time is spent on: a method that holds more bytes for the same layer looks "
        "better here than it is."
    )
    words = Words("forward_per_weight_byte_vs_N", "Forward time per byte of weight", caption)
    y = Axis("ps per weight byte", figure)
    return _asked(results, found, words, y, lambda r: 1e12 * r.median / r.memory["weight_bytes"])


def quality_speed_vs_size(results: Results) -> list[Drawing]:
    """(1 / forward ms) / (1 + mean absolute error), against N."""
    errors = {
        same_call(r): r.errors["output"]["mean"]
        for phase in ("correctness", "forward")
        for r in results.of(phase)
        if "mean" in r.errors.get("output", {})
    }
    found = [r for r in results.of("forward") if same_call(r) in errors]
    if results.of("forward") and not found:
        raise Absent("no forward result has a mean absolute error of its output")
    caption = (
        "(1 / forward time in ms) / (1 + mean absolute error of the output). Higher is better. "
        "With errors far below 1 it differs little from plain speed: errors are judged in their "
        "own plot."
    )
    words = Words("quality_adjusted_speed_vs_N", "Forward: quality-adjusted speed", caption)
    y = Axis("(1/ms) / (1 + error)", figure)
    return _asked(results, found, words, y, lambda r: 1e-3 / r.median / (1 + errors[same_call(r)]))


def errors_vs_size(results: Results) -> list[Drawing]:
    """Relative, largest and mean error of each tensor against N, at the largest B measured most."""
    found = [r for p in ("correctness", "forward") for r in results.of(p) if r.errors]
    phase = found[0].case.phase if found else "correctness"
    groups = series.by_size(few([r for r in found if r.case.phase == phase]), "correctness")
    caption = (
        "The truth is the dense product in float64, or accumulated in float32 for large N. "
        "Over plain dense: the error over that of plain dense in the same dtype, with the limit "
        "that a method must keep to pass (rounding two partial sums and their sum costs √2)."
    )
    words = Words("errors_vs_N", "Error against the truth", caption)
    tensors = [t for t in TENSORS if any(t in r.errors for r in found)]
    for panels in groups.values():
        # Errors hardly depend on B, so one B is drawn; the tables have the others.
        most = max(reversed(panels), key=lambda panel: len(panel.results))
        panels[:] = [_errors(most, t, measure) for measure in MEASURES for t in tensors]
    options = {"columns": max(2, len(tensors)), "height": 2.3, "checks": True}
    return series.charts(results, groups, words, **options)


def _errors(panel: Sketch, tensor: str, measure: str) -> Sketch:
    def value(result: Result) -> float | None:
        error = result.errors.get(tensor, {}).get(measure)
        # A log axis has no zero: an exact result is drawn in the ratio alone.
        return error if measure == "ratio" or error else None

    title = f"{TENSORS[tensor]}, {panel.title}" if measure == "relative" else ""
    y = Axis(MEASURES[measure], "{:.3g}".format, "even" if measure == "ratio" else "log")
    limits = {r.case.N: r.errors.get(tensor, {}).get("limit") for r in panel.results}
    limits = {n: limit for n, limit in limits.items() if limit is not None and measure == "ratio"}
    return Sketch(title, "N", panel.results, y, value, series.grey("limit to pass", limits))


def _asked(results: Results, found, words: Words, y: Axis, value) -> list[Drawing]:
    groups = series.by_size(few(found), "forward", most=2)
    return series.charts(results, groups, words, y, value, checks=True)


def _bytes(value: float) -> str:
    return f"{size(value)} ({value:,.0f} bytes)"
