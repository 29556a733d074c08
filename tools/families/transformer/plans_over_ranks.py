"""Sync plans over ranks that share one model: time, and time over standard on as many ranks.

The speed of a row is over standard on the fewest ranks that were measured.
"""

from collections.abc import Sequence
from functools import partial

from tools.cases import Result, Results, grouped, over, over_ranks
from tools.drawing import series
from tools.drawing.chart import Absent, Drawing, Line, Panel, Point
from tools.drawing.series import Words
from tools.families.transformer.costs import KINDS
from tools.families.transformer.points import (
    NAMING,
    PHASES,
    USUAL_SUM,
    baseline,
    by_place,
    model,
    of_phase,
    over_baseline,
    place,
    plan_words,
    setting,
    without_ranks,
)
from tools.family import Written
from tools.tables import Column, as_markdown, filled, interval, milliseconds, number

PLANS = ("decode", "sync")
# Figure -> how it is read.
SHOWN = {
    "time": "Median time on the slowest rank. One rank sums nothing. Lower is better.",
    "ratio": "Median time over that of standard tensor parallelism with the backend's all-reduce "
    "on as many ranks, in the same rounds, with 95% intervals. Lower is better.",
}
COLUMNS = (
    Column("model", "model"),
    number("batch", "batch"),
    number("T", "T"),
    Column("plan", "plan"),
    Column("reduce", "sum"),
    number("ranks", "ranks"),
    number("median", "ms", milliseconds),
    number("over_standard", "over standard", interval),
    number("speed", "speed over standard on the fewest ranks", interval),
)


def tables(results: Results) -> list[Written]:
    """A table of each phase and setting."""
    made = []
    for phase in PLANS:
        for text, models in _models(results, phase).items():
            rows = [row for here in models for row in _rows(here)]
            words = f"{PHASES[phase].capitalize()}, over the ranks that share a model."
            made.append(Written(words, text, as_markdown(filled(COLUMNS, rows), rows)))
    return made


def by_ranks(results: Results, phase: str, kind: str) -> list[Drawing]:
    """A value against ranks, a panel for each model, batch and sum, a line for each plan."""
    one = KINDS[kind]
    words = Words(
        f"transformer_{phase}_{kind}_vs_ranks",
        f"Fewer syncs, {PHASES[phase]}: {one.title} against ranks",
        SHOWN[kind],
    )
    groups = {}
    for text, models in _models(results, phase).items():
        panels = [panel for here in models for panel in _panels(here, kind)]
        if panels:
            groups[text] = panels
    if not groups:
        raise Absent(f"{PHASES[phase]}: a line needs two numbers of ranks")
    return [series.drawn(results, words, text, groups, panels) for text, panels in groups.items()]


def _models(results: Results, phase: str) -> dict[str, list[list[Result]]]:
    """By setting, the results of each model and batch that several numbers of ranks have."""
    found = [r for r in of_phase(results, phase) if "syncs" in r.rates]
    places = grouped(found, lambda r: place(without_ranks(r.case)))
    groups: dict[str, list[list[Result]]] = {}
    for _, here in sorted(places.items()):
        if over_ranks(here):
            groups.setdefault(setting(without_ranks(here[0].case)), []).append(here)
    return groups


def _rows(models: Sequence[Result]) -> list[dict]:
    """Of one model and batch: plans in reading order, each from the fewest ranks to the most."""
    places = by_place(models)
    first = _first(models)
    return [
        {
            "model": model(r.case),
            "batch": r.case.batch,
            "T": r.case.T,
            "plan": plan_words(r),
            "reduce": r.case.reduce or USUAL_SUM,
            "ranks": r.case.ranks,
            "median": r.median,
            "over_standard": over_baseline(r, places[place(r.case)]),
            "speed": None if first in (None, r) else over(first, r),
        }
        for r in sorted(models, key=lambda r: (r.line_order, r.label, r.case.ranks))
    ]


def _first(models: Sequence[Result]) -> Result | None:
    """Standard on the fewest ranks; None where it was not measured there."""
    fewest = min(r.case.ranks for r in models)
    return baseline(r for r in models if r.case.ranks == fewest)


def _panels(models: Sequence[Result], kind: str) -> list[Panel]:
    places, made = by_place(models), []
    case = models[0].case
    for sum_, found in grouped(models, lambda r: r.case.reduce or USUAL_SUM).items():
        lines = []
        for words, group in grouped(found, plan_words).items():
            valued = [(r, KINDS[kind].value(r, places[place(r.case)])) for r in group]
            points = [_at(r.case.ranks, value) for r, value in valued if value is not None]
            if len(points) > 1:
                lines.append(Line(words, tuple(sorted(points)), _look(group[0])))
        if lines:
            title = f"{model(case)}, batch {case.batch}, {sum_}"
            made.append(Panel(title, tuple(lines), "ranks", KINDS[kind].axis))
    return made


def _look(result: Result) -> dict:
    colour, marker = NAMING.methods.get(result.case.method, ("#7a7f87", "*"))
    return {"color": colour, "marker": marker, "linewidth": 1.8, "markersize": 7}


def _at(ranks: int, value: float | Point) -> Point:
    return value._replace(x=ranks) if isinstance(value, Point) else Point(ranks, value)


FIGURES = {
    f"transformer_{phase}_{kind}_vs_ranks": partial(by_ranks, phase=phase, kind=kind)
    for phase in PLANS
    for kind in SHOWN
}
