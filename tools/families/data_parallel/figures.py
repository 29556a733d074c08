"""Data-parallel figures: bars of the methods for each model, lines over bucket sizes, losses."""

from collections.abc import Callable, Sequence
from functools import partial

from tools.cases import Result, Results, grouped
from tools.drawing import bars, series, style
from tools.drawing.chart import Absent, Axis, Drawing, Line, Panel, Point, merged
from tools.drawing.looks import line_style, shaded
from tools.drawing.series import Kind, Sketch, Words
from tools.families.data_parallel.points import (
    NONE,
    PHASES,
    by_place,
    efficiency,
    epoch_hours,
    model,
    of_phase,
)
from tools.tables import count, figure, size

MOST_GROUPS = 6
VARIANT = 0.35  # towards white: the colour of a method's variant


def _percent(value: float) -> str:
    return f"{value:.1f}%"


def _efficiency(result: Result, here: Sequence[Result]) -> float | None:
    found = efficiency(result, here)
    return None if found is None else 100 * found.value


def _communication(result: Result, here: Sequence[Result]) -> float | None:
    found = efficiency(result, here)
    return None if found is None else max(0.0, 100 * (1 - found.value))


KINDS = {
    "time": Kind(
        "time",
        "Median time of a step on the slowest rank. none exchanges nothing: what one rank takes. "
        "Lower is better.",
        Axis("ms", lambda ms: f"{figure(ms)} ms", "bars"),
        lambda result, here: 1e3 * result.median,
    ),
    "throughput": Kind(
        "throughput",
        "Tokens of all ranks a second. none exchanges nothing, and is what perfect scaling gives. "
        "Higher is better.",
        Axis("thousand tokens/s", lambda rate: f"{count(1e3 * rate)} tokens/s", "bars"),
        lambda result, here: result.rates.get("tokens_per_s", 0) / 1e3 or None,
    ),
    "memory": Kind(
        "peak memory of a rank",
        "The most that was allocated on a rank during a step: parameters, gradients, optimizer, "
        "buckets and activations. Lower is better.",
        Axis("GiB", lambda gib: size(gib * 2**30), "bars"),
        lambda result, here: (result.memory.get("peak_bytes") or 0) / 2**30 or None,
    ),
    "scaling": Kind(
        "scaling efficiency",
        "Throughput over that of as many ranks that exchange nothing, measured in the same rounds. "
        "Dashed: all of it. Higher is better.",
        Axis("%", _percent, "bars", 100.0),
        _efficiency,
    ),
    "epoch": Kind(
        "wall time of an epoch",
        "Hours for the 9.04 billion tokens of OpenWebText at the measured tokens a second, without "
        "evaluation and checkpoints. Lower is better.",
        Axis("hours", lambda hours: f"{figure(hours)} h", "bars"),
        lambda result, here: epoch_hours(result),
    ),
    "communication": Kind(
        "share of communication",
        "The part of the time of forward, backward and exchange that is gone where nothing is "
        "exchanged: what of the exchange is not hidden behind the backward. Lower is better.",
        Axis("%", _percent, "bars"),
        _communication,
    ),
}


def by_model(results: Results, phase: str, kind: str) -> list[Drawing]:
    """Bars of a kind: a group for each model (and attention), a bar for each method."""
    one = KINDS[kind]
    words = Words(
        f"data_parallel_{phase}_{kind}",
        f"Data parallel, {PHASES[phase]}: {one.title}",
        one.caption,
    )
    # Bucket sizes have a figure of their own.
    found = [r for r in of_phase(results, phase) if "bucket_mib" not in r.unusual]
    if not found:
        raise Absent(f"no results of {PHASES[phase]}")
    groups = _settings(found)
    drawings = []
    for text, group in groups.items():
        panel = _bars(group, one)
        if panel.lines:
            options = {"columns": 1, "height": 2.6, "draw": bars.grouped}
            drawings.append(series.drawn(results, words, text, groups, [panel], **options))
    if not drawings:
        raise Absent(f"no result of {PHASES[phase]} has what it shows")
    return drawings


def vs_bucket(results: Results, phase: str) -> list[Drawing]:
    """Time against the size of a bucket, a panel for each model."""
    words = Words(
        f"data_parallel_{phase}_vs_bucket",
        f"Data parallel, {PHASES[phase]}: time against the size of a bucket",
        "Median time of a step on the slowest rank, against MiB of gradients that travel together. "
        f"Dashed: {NONE}, which exchanges nothing. Lower is better.",
    )
    groups = {}
    for text, group in _settings(of_phase(results, phase)).items():
        sketches = []
        for here in by_place(group).values():
            sized = [r for r in here if r.case.bucket_mib and "compute_dtype" not in r.unusual]
            places = {r.case.bucket_mib for r in sized}
            if len(places) > 1:
                alone = [1e3 * r.median for r in here if r.case.method == NONE]
                limit = series.grey(NONE, dict.fromkeys(places, alone[0]) if alone else {})
                lines = [*_over_buckets(sized), *limit]
                sketches.append((_title(here[0]), lines))
        if sketches:
            groups[text] = sketches
    if not groups:
        raise Absent("a line needs two bucket sizes of one method at one model")
    y = Axis("ms", "{:.4g} ms".format, "log")
    return [
        series.drawn(
            results,
            words,
            text,
            groups,
            [Panel(title, tuple(lines), "MiB of a bucket", y) for title, lines in sketches],
        )
        for text, sketches in groups.items()
    ]


def losses(results: Results) -> list[Drawing]:
    """The loss of the first steps, a panel for each model and attention."""
    words = Words(
        "data_parallel_lm_losses",
        "Data parallel, language model: loss of the first steps",
        "Mean over ranks, from the same first weights on the same text. A method that trains all "
        f"ranks as one has one line with the others; {NONE} trains each rank alone.",
    )
    found = [r for r in of_phase(results, "lm") if r.curves.get("loss") and r.as_usual]
    groups = {
        text: [Sketch(_title(here[0]), "step", here) for here in by_place(group).values()]
        for text, group in _settings(found).items()
    }
    if not groups:
        raise Absent("no losses of the first steps")
    return [
        series.drawn(results, words, text, groups, merged(list(map(_curves, sketches))))
        for text, sketches in groups.items()
    ]


def _settings(found: Sequence[Result]) -> dict[str, list[Result]]:
    groups = grouped(found, lambda result: result.setting)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def _bars(group: Sequence[Result], kind: Kind) -> Panel:
    places = style.spread(list(by_place(group).values()), MOST_GROUPS)
    points: dict[str, list[Point]] = {}
    first: dict[str, Result] = {}
    for i, here in enumerate(places):
        for result in here:
            value = kind.value(result, here)
            first.setdefault(result.label, result)
            if value is not None:
                points.setdefault(result.label, []).append(Point(i, value))
    order = sorted(points, key=lambda label: (first[label].line_order, label))
    lines = tuple(Line(label, tuple(points[label]), _look(first[label])) for label in order)
    names = tuple(_title(here[0]).replace(", ", "\n") for here in places)
    return Panel("", lines, "", kind.axis, names)


def _look(result: Result) -> dict:
    colour = line_style(result)["color"]
    return {"color": shaded(colour, VARIANT) if result.unusual else colour}


def _over_buckets(sized: Sequence[Result]) -> list[Line]:
    made = []
    for method, found in grouped(sized, lambda r: r.case.method).items():
        usual = next((r for r in found if r.as_usual), found[0])
        points = sorted(Point(r.case.bucket_mib, 1e3 * r.median) for r in found)
        made.append(Line(method, tuple(points), line_style(usual)))
    return made


def _curves(sketch: Sketch) -> Panel:
    lines = []
    for result in sketch.results:
        look = line_style(result) | {"marker": ""}
        points = tuple(Point(i + 1, loss) for i, loss in enumerate(result.curves["loss"]))
        lines.append(Line(result.label, points, look))
    return Panel(sketch.title, tuple(lines), sketch.x, Axis("loss", "{:.3f}".format, "log"))


def _title(result: Result) -> str:
    """The model, its batch, and its attention where that was chosen."""
    case = result.case
    parts = [model(case), f"{case.batch} × {case.T}", *([case.attention] if case.attention else [])]
    return ", ".join(parts)


ASKED = {
    "gradients": ("time", "communication"),
    "training": ("time", "throughput", "memory", "scaling", "epoch"),
    "lm": ("time", "throughput", "memory", "scaling", "epoch"),
}
FIGURES: dict[str, Callable[[Results], list[Drawing]]] = {
    f"data_parallel_{phase}_{kind}": partial(by_model, phase=phase, kind=kind)
    for phase, kinds in ASKED.items()
    for kind in kinds
}
FIGURES |= {
    f"data_parallel_{phase}_vs_bucket": partial(vs_bucket, phase=phase)
    for phase in ("gradients", "training")
}
FIGURES["data_parallel_lm_losses"] = losses
