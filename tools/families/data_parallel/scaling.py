"""Data parallelism over ranks, each of them with as many sequences.

With t(R) the time of a method's step on R ranks, and Q the fewest ranks that were measured:

    scaling    t(Q) / t(R)    1 where R ranks train R / Q times as many tokens a second
"""

from collections.abc import Sequence
from functools import partial

from tools.cases import Result, Results, grouped, over, over_ranks
from tools.drawing import series
from tools.drawing.chart import Absent, Axis, Drawing, Point
from tools.drawing.series import Sketch, Words
from tools.families.data_parallel.points import (
    NONE,
    PEER,
    PHASES,
    by_place,
    efficiency,
    model,
    of_phase,
    over_peer,
    place,
    setting,
    without_ranks,
)
from tools.family import Scaling, Written
from tools.tables import Column, as_markdown, count, filled, interval, milliseconds, number

COLUMNS = (
    Column("model", "model"),
    number("batch", "sequences a rank"),
    number("T", "T"),
    Column("attention", "attention"),
    Column("method", "method"),
    number("ranks", "ranks"),
    number("median", "ms", milliseconds),
    number("tokens_per_s", "tokens/s", count),
    number("scaling", "of the fewest ranks", interval),
    number("efficiency", f"of {NONE}", interval),
    number("over_peer", f"speed over {PEER}", interval),
)


def tables(results: Results) -> list[Written]:
    """A table of each phase and setting."""
    made = []
    for phase, words in PHASES.items():
        places = by_place(of_phase(results, phase))
        for text, lines in _lines(results, phase).items():
            rows = [_row(r, line[0], places[place(r.case)]) for line in lines for r in line]
            told = (
                f"Data parallel over ranks, {words}: tokens a second of a rank over those on the "
                f"fewest ranks, and over those of as many ranks that exchange nothing ({NONE})."
            )
            made.append(Written(told, text, as_markdown(filled(COLUMNS, rows), rows)))
    return made


def by_ranks(results: Results, phase: str) -> list[Drawing]:
    """Scaling against ranks, a panel for each model, a line for each method."""
    words = Words(
        f"data_parallel_{phase}_vs_ranks",
        f"Data parallel, {PHASES[phase]}: scaling efficiency over ranks",
        "Tokens a second of a rank over those on the fewest ranks that were measured, with 95% "
        f"intervals; each rank has as many sequences. {NONE} exchanges nothing: what it loses is "
        "the machine's. Higher is better.",
    )
    groups = {
        text: [
            Sketch(title, "ranks", found)
            for title, found in grouped((r for line in lines for r in line), _title).items()
        ]
        for text, lines in _lines(results, phase).items()
    }
    if not groups:
        raise Absent(f"{PHASES[phase]}: a line needs two numbers of ranks")
    first = {line[0].id: line[0] for line in over_ranks(of_phase(results, phase))}

    def value(result: Result) -> Point:
        found = over(first[result.id], result)
        return Point(0, found.value, found.low, found.high)

    axis = Axis("efficiency", "{:.3f}".format, "ratio", 1.0, least=0.8)
    return series.charts(results, groups, words, axis, value)


def _lines(results: Results, phase: str) -> dict[str, list[list[Result]]]:
    """By setting, the cases that several numbers of ranks have; small models first."""
    lines = over_ranks(of_phase(results, phase))
    lines.sort(key=lambda line: (place(without_ranks(line[0].case)), line[0].line_order))
    groups: dict[str, list[list[Result]]] = {}
    for line in lines:
        groups.setdefault(setting(without_ranks(line[0].case)), []).append(line)
    return groups


def _row(result: Result, first: Result, here: Sequence[Result]) -> dict:
    case = result.case
    return {
        **result.rates,
        "model": model(case),
        "batch": case.batch,
        "T": case.T,
        "attention": case.attention,
        "method": result.label,
        "ranks": case.ranks,
        "median": result.median,
        "scaling": None if result is first else over(first, result),
        "efficiency": efficiency(result, here),
        "over_peer": over_peer(result, here),
    }


def _title(result: Result) -> str:
    case = result.case
    parts = [model(case), f"{case.batch} × {case.T} a rank"]
    return ", ".join([*parts, *([case.attention] if case.attention else [])])


SCALING = Scaling(
    tables,
    {f"data_parallel_{phase}_vs_ranks": partial(by_ranks, phase=phase) for phase in PHASES},
)
