"""Figures of the training study: validation loss against steps, and against speed."""

from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes

from tools.cases import Result, Results
from tools.drawing import series, style
from tools.drawing.chart import Absent, Axis, Drawing, Line, Panel, Point
from tools.drawing.looks import line_style
from tools.drawing.series import Words
from tools.families.transformer.losses import WITHIN, Trained, recipe_words, trained
from tools.families.transformer.points import (
    baseline,
    by_place,
    of_phase,
    over_baseline,
    setting,
)

LOSS = Axis("validation loss", "{:.4f}".format, "log")
ABOVE = Axis("loss over standard", "{:.4f}".format, "log", 1 + WITHIN)


def losses(results: Results) -> list[Drawing]:
    """Validation loss against steps, and over the baseline's at the same step."""
    words = Words(
        "transformer_study_losses",
        "Fewer syncs: validation loss against steps",
        "Models trained from scratch, alike but for the plan: the same data, seed and schedule. "
        "Where several seeds were trained, their mean, with the lowest and the highest. Right: "
        f"over a sync after every sublayer, at the same step; grey: {WITHIN:.0%} above it.",
    )
    groups = {_setting(plans): plans for plans in trained(results)}
    if not groups:
        raise Absent("no results of the training study")
    drawings = []
    for text, plans in groups.items():
        panels = [
            _panel("loss", plans, _losses, LOSS),
            _panel("against standard", plans, _above, ABOVE),
        ]
        panels = [panel for panel in panels if panel.lines]
        drawings.append(series.drawn(results, words, text, groups, panels, height=3.6))
    return drawings


def trade(results: Results) -> list[Drawing]:
    """The last validation loss against speed, a point a plan, a panel for each speed."""
    words = Words(
        "transformer_study_trade",
        "Fewer syncs: validation loss against speed",
        "The last validation loss of each plan against its speed over that of a sync after every "
        "sublayer: in its training run, and in training steps and decoding that were measured side "
        "by side, with the backend's all-reduce. Grey: the loss that is "
        f"{WITHIN:.0%} above that plan's. Bars: the lowest and the highest of several seeds. Lower "
        "and further right is better.",
    )
    groups = {_setting(plans): plans for plans in trained(results) if plans[0].standard}
    drawings = []
    for text, plans in groups.items():
        limit = (1 + WITHIN) * _standard(plans).loss
        panels = []
        for title, speed in (
            ("training runs", Trained.speed.fget),
            *measured_speeds(results, plans),
        ):
            lines = [_spot(one, x) for one in plans if (x := speed(one)) is not None]
            if len(lines) > 1:
                y = Axis("validation loss", "{:.4f}".format, "log", limit)
                panels.append(Panel(title, tuple(lines), "speed over standard", y))
        if panels:
            options = {"height": 3.6, "draw": spots}
            drawings.append(series.drawn(results, words, text, groups, panels, **options))
    if not drawings:
        raise Absent("no recipe has two plans, the standard one among them")
    return drawings


def spots(axes: Axes, panel: Panel, ids: dict[str, str]) -> dict[str, list]:
    """Each plan as a marker with its name beside it; both axes even, the rule dashed."""
    if panel.y.rule is not None:
        axes.axhline(panel.y.rule, color=style.FLOOR, linestyle=(0, (4, 2)), zorder=1)
    for line in panel.lines:
        (point,) = line.points
        look = line.look | {"linestyle": "none"}
        axes.plot([point.x], [point.y], gid=ids[line.label], label=line.label, **look)
        if point.low is not None:
            axes.vlines(point.x, point.low, point.high, color=line.look["color"], linewidth=1)
    axes.margins(0.12)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y.label)
    return {line.label: [(p.x, p.y) for p in line.points] for line in panel.lines}


def _setting(plans: Sequence[Trained]) -> str:
    seeds = sorted({seed for one in plans for seed in one.runs})
    parts = [recipe_words(plans), setting(plans[0].first.case)]
    parts += [f"seeds {', '.join(map(str, seeds))}"] * (len(seeds) > 1)
    return ", ".join(parts)


def _standard(plans: Sequence[Trained]) -> Trained:
    return next(one for one in plans if one.is_standard)


def _panel(title: str, plans, values: Callable, y: Axis) -> Panel:
    lines = []
    for one in plans:
        points = tuple(_point(step, found) for step, found in values(one).items())
        if points:
            look = _look(one) | {"linewidth": 1.6, "markersize": 4.5}
            lines.append(Line(one.words, points, look))
    return Panel(title, tuple(lines), "step", y)


def _losses(one: Trained) -> dict[float, list[float]]:
    return one.curve()


def _above(one: Trained) -> dict[float, list[float]]:
    """Over the baseline's mean loss at the same step."""
    if not one.standard:
        return {}
    standard = Trained(one.standard, one.standard).curve()
    return {
        step: [loss / (sum(standard[step]) / len(standard[step])) for loss in found]
        for step, found in one.curve().items()
        if step in standard
    }


def _point(x: float, values: Sequence[float]) -> Point:
    mean = sum(values) / len(values)
    return Point(x, mean, min(values), max(values)) if len(values) > 1 else Point(x, mean)


def _spot(one: Trained, speed: float) -> Line:
    look = _look(one) | {"markersize": 9}
    return Line(one.words, (_point(speed, one.losses),), look)


def _look(one: Trained) -> dict:
    return line_style(one.first)


def measured_speeds(results: Results, plans: Sequence[Trained]) -> list[tuple[str, Callable]]:
    """(title, speed of a plan) for each point of training steps and of decoding with this model."""
    case, found = plans[0].first.case, []
    trained = case.width, case.depth, case.tensor_ranks
    for phase, words in (("sync", "a training step"), ("decode", "decoding")):
        for here in by_place(of_phase(results, phase)).values():
            point = here[0].case
            if (point.width, point.depth, point.ranks) == trained:
                tokens = f"{point.T} in the cache" if phase == "decode" else f"{point.T} tokens"
                title = f"{words}, batch {point.batch}, {tokens}"
                found.append((title, partial(_measured_speed, here)))
    return found


def _measured_speed(here: Sequence[Result], one: Trained) -> float | None:
    """Of a plan among the results of a point, with the usual sum, over the baseline's."""
    method = one.first.case.method
    result = next((r for r in here if r.case.method == method and r.as_usual), None)
    if result is None or baseline(here) is None:
        return None
    ratio = over_baseline(result, here)
    return 1 / ratio.value if ratio else 1.0


FIGURES = {"transformer_study_losses": losses, "transformer_study_trade": trade}
