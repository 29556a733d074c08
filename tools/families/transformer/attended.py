"""The hybrid block over how many keys a query attends to: what a pattern leaves out, and gains."""

from collections.abc import Sequence
from functools import partial

from tools.cases import Result, Results, grouped
from tools.drawing import series
from tools.drawing.chart import Absent, Drawing, Line, Panel, Point
from tools.drawing.looks import SPARE_STYLES, line_style
from tools.drawing.series import Words
from tools.families.transformer.hybrid import DENSE, HYBRID, KINDS
from tools.families.transformer.points import by_place, of_phase

MEASURED = ("time", "speedup")


def by_keys(results: Results, phase: str, kind: str) -> list[Drawing]:
    """A value against keys of a query, a panel for each size, a line for each kind of pattern."""
    one = KINDS[kind]
    words = Words(
        f"transformer_{phase}_{kind}_vs_keys",
        f"{HYBRID[phase].capitalize()}: {one.title.removesuffix(' against length')} against keys",
        f"{one.caption} Keys are those that a query attends to, on average.",
    )
    found = [r for r in of_phase(results, phase) if "sparsity" in r.rates]
    groups = {}
    for text, group in grouped(found, lambda result: result.setting).items():
        places = by_place(group).values()
        if panels := [_panel(here, kind) for here in places if _patterns(here) > 1]:
            groups[text] = panels
    if not groups:
        raise Absent(f"{HYBRID[phase]}: a line needs two patterns")
    return [series.drawn(results, words, text, groups, panels) for text, panels in groups.items()]


def _patterns(here: Sequence[Result]) -> int:
    return len({r.case.pattern for r in here if r.case.pattern})


def _panel(here: Sequence[Result], kind: str) -> Panel:
    lines = []
    for place, (label, group) in enumerate(grouped(here, _builder).items()):
        valued = [(r, KINDS[kind].value(r, here)) for r in group]
        points = [_at(_keys(r), value) for r, value in valued if value is not None]
        if points:
            look = line_style(group[0])
            if label != DENSE:
                look["color"], look["marker"] = SPARE_STYLES[(place - 1) % len(SPARE_STYLES)]
            lines.append(Line(label, tuple(sorted(points)), look))
    if kind == "time":
        least = {_keys(r): 1e3 * r.floor["seconds"] for r in here if r.floor}
        lines += series.grey("floor", least)
    case = here[0].case
    title = f"width {case.width}, {case.heads} heads, batch {case.batch}, {case.T} tokens"
    return Panel(title, tuple(lines), "keys of a query", KINDS[kind].axis)


def _builder(result: Result) -> str:
    """band of band(1024): patterns of one kind are a line; one with an unusual sum is its own."""
    pattern, reduce = result.case.pattern, result.unusual.get("reduce")
    name = pattern.partition("(")[0] if pattern else DENSE
    return " · ".join([name, *([reduce] if reduce else [])])


def _keys(result: Result) -> float:
    return (1 - result.rates["sparsity"]) * result.case.T


def _at(x: float, value: float | Point) -> Point:
    return value._replace(x=x) if isinstance(value, Point) else Point(x, value)


FIGURES = {
    f"transformer_{phase}_{kind}_vs_keys": partial(by_keys, phase=phase, kind=kind)
    for phase in HYBRID
    for kind in MEASURED
}
