"""What happens within a training step, and over the steps of a drift run."""

from tools.cases import Result, Results
from tools.drawing import bars, series, style
from tools.drawing.chart import Axis, Drawing, Line, Panel, Point, merged
from tools.drawing.looks import line_style
from tools.drawing.series import Words
from tools.families.linear.opponents import same_call
from tools.tables import figure

SEGMENTS = {
    "forward": "#0072b2",
    "backward": "#56b4e9",
    "communication": "#e69f00",
    "compress": "#d55e00",
    "optimizer": "#8a5fa8",
    "other": "#c3c8ce",
}
COMMUNICATION = ("allreduce", "allgather", "layout_fix")
MOST, MOST_DRIFTS = 2, 6
REPORTED = {"marker": "d", "linestyle": "none", "color": style.INK, "markersize": 6}


def step_breakdown(results: Results) -> list[Drawing]:
    """Stacked bars of a training step, a panel for each N and B."""
    found = [r for r in results.of("training") if "total" in r.regions and r.as_usual]
    groups = style.settings(found, "instrumented training")
    ahead = {same_call(r): r for r in results.of("forward") if r.regions}
    caption = (
        "Averages of the instrumented pass. Communication is the collectives and the copies made "
        "for their layout; it happens within forward and backward, and is taken out of them. The "
        "diamond is the median step that was reported, measured without instruments. The smallest "
        "and the largest sizes are drawn."
    )
    words = Words("step_breakdown", "Training step: where the time goes", caption)
    drawings = []
    for text, group in groups.items():
        labels = [line[0].label for line in style.lines(group)]
        panels = []
        for n in style.spread(sorted({r.case.N for r in group}), MOST):
            for b in style.spread(sorted({r.case.B for r in group}), MOST):
                here = {r.label: r for r in group if (n, b) == (r.case.N, r.case.B)}
                if here:
                    panels.append(_bars(f"N = {n}, B = {b}", here, labels, ahead))
        options = {"columns": 2, "height": 0.24 * len(labels) + 0.9, "draw": bars.stacked}
        drawings.append(series.drawn(results, words, text, groups, panels, **options))
    return drawings


def drift_by_step(results: Results) -> list[Drawing]:
    """Error after each of T forward-only steps, for the method and for plain dense."""
    found = [r for r in results.of("drift") if r.drift.get("method")]
    groups = style.settings(found, "drift")
    caption = (
        "The output is normalised and fed back as the next input; the error is against the same "
        "steps in the reference. Dashed: plain dense in the same dtype, which drifts as well."
    )
    words = Words("drift", "Drift: error after repeated forward steps", caption)
    drawings = []
    for text, group in groups.items():
        places = style.spread(sorted({(r.case.N, r.case.B) for r in group}), MOST_DRIFTS)
        panels = [
            _drift(f"N = {n}, B = {b}", [r for r in group if (n, b) == (r.case.N, r.case.B)])
            for n, b in places
        ]
        drawings.append(series.drawn(results, words, text, groups, merged(panels), checks=True))
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


def _bars(title: str, here: dict[str, Result], labels: list[str], ahead: dict) -> Panel:
    """A panel of stacked segments; x is the place of the label."""
    points: dict[str, list[Point]] = {name: [] for name in [*SEGMENTS, "reported step"]}
    for i, label in enumerate(labels):
        if label in here:
            result = here[label]
            for name, value in segments(result, ahead.get(same_call(result))).items():
                if value > 0:
                    points[name].append(Point(i, 1e3 * value))
            points["reported step"].append(Point(i, 1e3 * result.median))
    looks = {name: {"color": colour} for name, colour in SEGMENTS.items()}
    looks["reported step"] = REPORTED
    lines = tuple(Line(name, tuple(points[name]), look) for name, look in looks.items())
    return Panel(title, lines, "", Axis("ms", lambda ms: f"{figure(ms)} ms"), tuple(labels))


def _drift(title: str, found: list[Result]) -> Panel:
    lines = []
    for line in style.lines(found):
        values = line[0].drift["method"]
        look = line_style(line[0]) | {"markevery": max(1, len(values) // 6)}
        lines.append(Line(line[0].label, _steps(values), look))
    dense = next((r.drift["dense"] for r in found if r.drift.get("dense")), ())
    if dense:
        look = {"color": style.INK, "linestyle": (0, (4, 2)), "linewidth": 1.4}
        lines.append(Line("plain dense, same dtype", _steps(dense), look))
    return Panel(title, tuple(lines), "step", Axis("relative error", figure, "even"))


def _steps(values: tuple[float, ...]) -> tuple[Point, ...]:
    return tuple(Point(i, value) for i, value in enumerate(values, 1))
