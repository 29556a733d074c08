"""What fewer syncs buy: time, ratio and share of communication against the syncs of a plan."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from tools.cases import Result, Results, grouped
from tools.drawing import series
from tools.drawing.chart import Absent, Axis, Drawing, Line, Panel, Point
from tools.drawing.series import Kind, Words
from tools.drawing.style import PAPER
from tools.families.transformer.points import (
    PHASES,
    SUMS,
    USUAL_SUM,
    baseline,
    by_place,
    communication,
    evenly,
    model,
    of_phase,
    over_baseline,
)
from tools.tables import milliseconds

OTHER = {"linestyle": "none", "markersize": 8, "markerfacecolor": PAPER, "markeredgewidth": 1.6}


def _ratio(result: Result, here: Sequence[Result]) -> Point | float | None:
    if result is baseline(here):
        return 1.0
    found = over_baseline(result, here)
    return found and Point(0, found.value, found.low, found.high)


def share(result: Result, here: Sequence[Result]) -> float | None:
    """Per cent of a step that its sums over ranks take; None where that is not known."""
    found = communication(result, here)
    return None if found is None else 100 * found


KINDS = {
    "time": Kind(
        "time",
        "Median time on the slowest rank against the syncs of one forward. Dashed: the floor, what "
        "reading the weights and the cache, arithmetic and sums over ranks cost at the rates "
        "measured on this machine, the largest of them. Lower is better.",
        Axis("ms", lambda ms: f"{milliseconds(1e-3 * ms)} ms", "log"),
        lambda result, here: 1e3 * result.median,
    ),
    "ratio": Kind(
        "time over standard",
        "Median time over that of standard tensor parallelism with the backend's all-reduce, in "
        "the same rounds, with 95% intervals. Lower is better.",
        Axis("time over standard", "{:.3f}".format, "ratio", 1.0, least=0.7),
        _ratio,
    ),
    "communication": Kind(
        "share of communication",
        "Time of the sums over ranks in a step, as a share of the step, in an instrumented pass, "
        "with waiting for other ranks. Decoding in a graph: syncs times what a further one costs.",
        Axis("%", "{:.1f}%".format, "even"),
        share,
    ),
}


def by_syncs(results: Results, phase: str, kind: str) -> list[Drawing]:
    """A value against the syncs of a plan, a panel for each model and batch, a line for each sum.

    Plans whose syncs are not all that tells them apart are points of their own.
    """
    one = KINDS[kind]
    title = f"Fewer syncs, {PHASES[phase]}: {one.title}"
    words = Words(f"transformer_{phase}_{kind}", title, one.caption)
    found = [r for r in of_phase(results, phase) if "syncs" in r.rates]
    if not found:
        raise Absent(f"no results of {PHASES[phase]}")
    groups = grouped(found, lambda result: result.setting)
    groups = dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))
    drawings = []
    for text, group in groups.items():
        panels = [_panel(here, phase, one, kind) for here in by_place(group).values()]
        panels = [panel for panel in panels if panel.lines]
        if panels:
            drawings.append(series.drawn(results, words, text, groups, panels))
    if not drawings:
        raise Absent(f"{PHASES[phase]}: no point has two plans, the standard one among them")
    return drawings


def _panel(here: Sequence[Result], phase: str, kind: Kind, name: str) -> Panel:
    lines = []
    for sum_, found in grouped(here, lambda r: r.case.reduce or USUAL_SUM).items():
        colour, marker = SUMS[sum_]
        look = {"color": colour, "marker": marker, "linewidth": 2, "markersize": 7}
        lines += _line(sum_, [r for r in found if evenly(r)], here, kind, look)
        for result in found:
            if not evenly(result):
                own = look | OTHER | {"markeredgecolor": colour}
                own["marker"] = result.naming.methods.get(result.case.method, ("", "*"))[1]
                lines += _line(f"{result.case.method} · {sum_}", [result], here, kind, own)
    if name == "time":
        floors = {r.rates["syncs"]: 1e3 * r.floor["seconds"] for r in here if r.floor}
        # Within the axis: how far above it decoding stays is a finding.
        lines += [replace(line, bound=False) for line in series.grey("floor", floors)]
    case = here[0].case
    tokens = f"{case.T} in the cache" if phase == "decode" else f"{case.T} tokens"
    title = f"{model(case)}, batch {case.batch}, {tokens}"
    # Two plans make a line; the baseline alone says nothing of fewer syncs.
    if len({point.x for line in lines for point in line.points}) < 2:
        lines = []
    return Panel(title, tuple(lines), "syncs of a forward", kind.axis)


def _line(label: str, found, here: Sequence[Result], kind: Kind, look: dict) -> list[Line]:
    points = []
    for result in sorted(found, key=lambda r: r.rates["syncs"]):
        value, x = kind.value(result, here), result.rates["syncs"]
        if value is not None:
            points.append(value._replace(x=x) if isinstance(value, Point) else Point(x, value))
    return [Line(label, tuple(points), look)] if points else []


FIGURES: dict[str, Callable[[Results], list[Drawing]]] = {
    f"transformer_{phase}_{kind}": partial(by_syncs, phase=phase, kind=kind)
    for phase in ("decode", "sync")
    for kind in KINDS
}
