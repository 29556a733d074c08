"""How the hybrid block scales over ranks.

With t(R, b) the time of b sequences on R ranks, and Q the fewest ranks that were measured:

    strong   Q t(Q, b) / (R t(R, b))         the same work on more ranks; 1 where all of it helps
    weak     t(Q, b Q / R) / t(R, b)         the same work for each rank
"""

from collections.abc import Iterable, Sequence
from functools import partial

from tools.cases import Result, Results, grouped
from tools.drawing import series, style
from tools.drawing.chart import Absent, Axis, Drawing, Line, Panel, Point
from tools.drawing.looks import line_style
from tools.drawing.series import Words
from tools.families.transformer import plans_over_ranks
from tools.families.transformer.hybrid import HYBRID
from tools.families.transformer.points import of_phase, plan_words, setting, without_ranks
from tools.family import Scaling, Written
from tools.stats import Interval, combine
from tools.tables import Column, as_markdown, interval, milliseconds, number

COLUMNS = (
    number("width", "width"),
    number("T", "T"),
    Column("attention", "attention"),
    number("batch", "batch"),
    number("ranks", "ranks"),
    number("median", "ms", milliseconds),
    number("strong", "strong", interval),
    number("weak", "weak", interval),
)
SAME = ("width", "heads", "T", "dtype", "causal", "compiled", "reduce", "seed")
AXIS = Axis("efficiency", "{:.3f}".format, "ratio", 1.0, least=0.8)
MOST = 2  # batches that a figure shows of each kind of scaling


def tables(results: Results) -> list[Written]:
    """A table of each phase and setting."""
    made = []
    for phase, words in HYBRID.items():
        for text, found in _settings(results, phase).items():
            told = (
                f"{words.capitalize()}, over ranks: strong scaling keeps the batch, weak scaling "
                "that of a rank."
            )
            made.append(Written(told, text, as_markdown(COLUMNS, rows(found))))
    return made


def by_ranks(results: Results, phase: str) -> list[Drawing]:
    """Both kinds of scaling against ranks, a panel for a batch, a line for each attention."""
    words = Words(
        f"transformer_{phase}_vs_ranks",
        f"{HYBRID[phase].capitalize()}: scaling over ranks",
        "Speed on R ranks over that on the fewest ranks that were measured, for each rank, with "
        "95% intervals. Strong: of the same batch. Weak: of a batch that grows with the ranks. "
        "Higher is better.",
    )
    groups = {}
    for text, found in _settings(results, phase).items():
        made = rows(found)
        panels = [*_panels(made, "strong", "batch"), *_panels(made, "weak", "share")]
        if panels:
            groups[text] = panels
    if not groups:
        raise Absent(f"{HYBRID[phase]}: a line needs two numbers of ranks")
    return [series.drawn(results, words, text, groups, panels) for text, panels in groups.items()]


def rows(results: Iterable[Result]) -> list[dict]:
    """A row for each result of one phase of the block; `strong` and `weak` are Intervals, or None.

    share: the batch that the fewest ranks have in weak scaling; None where it is not whole.
    """
    made = []
    for group in grouped(sorted(results, key=_order), _what).values():
        made += [_row(result, group) for result in group]
    return made


def _what(result: Result) -> tuple:
    """Equal for what differs in ranks and batch alone."""
    case = result.case
    return (case.phase, case.method, case.pattern, *(getattr(case, name) for name in SAME))


def _order(result: Result) -> tuple:
    case = result.case
    return (case.phase, case.width, case.T, result.line_order, case.batch, case.ranks)


def _row(result: Result, group: Sequence[Result]) -> dict:
    case = result.case
    times = {(r.case.ranks, r.case.batch): r for r in group}
    fewest = min(r.case.ranks for r in group)
    same = times.get((fewest, case.batch))
    share, rest = divmod(case.batch * fewest, case.ranks)
    smaller = times.get((fewest, share)) if not rest else None
    return {
        "result": result,
        "fewest": fewest,
        "share": None if rest else share,
        "width": case.width,
        "T": case.T,
        "attention": plan_words(result),
        "batch": case.batch,
        "ranks": case.ranks,
        "median": result.median,
        "strong": _efficiency(same, result, fewest / case.ranks),
        "weak": _efficiency(smaller, result, 1.0),
    }


def _efficiency(first: Result | None, result: Result, share: float) -> Interval | None:
    if first is None or first is result:
        return None
    return combine(lambda t, own: share * t / own, [first.samples, result.samples])


def _settings(results: Results, phase: str) -> dict[str, list[Result]]:
    """The results of each setting that has several numbers of ranks."""
    groups = grouped(of_phase(results, phase), lambda r: setting(without_ranks(r.case)))
    return {text: found for text, found in groups.items() if len({r.case.ranks for r in found}) > 1}


def _panels(made: Sequence[dict], kind: str, batch: str) -> list[Panel]:
    """batch: the key of what is the same along a line."""
    places: dict[tuple, dict[str, list[dict]]] = {}
    for row in made:
        if row["ranks"] == row["fewest"] or row[kind] is not None:
            place = row["width"], row["T"], row[batch], row["fewest"]
            places.setdefault(place, {}).setdefault(row["attention"], []).append(row)
    panels = []
    for (width, T, sequences, fewest), lines in sorted(places.items()):
        drawn = tuple(_line(label, found, kind) for label, found in lines.items() if found[1:])
        if drawn:
            on = "" if kind == "strong" else f" on {fewest} rank" + "s" * (fewest != 1)
            title = f"{kind}: width {width}, T {T}, batch {sequences}{on}"
            panels.append(Panel(title, drawn, "ranks", AXIS))
    longest = max((_reach(panel) for panel in panels), default=0)
    return style.spread([panel for panel in panels if _reach(panel) == longest], MOST)


def _reach(panel: Panel) -> int:
    """On how many numbers of ranks it has points."""
    return max(len(line.points) for line in panel.lines)


def _line(label: str, found: Sequence[dict], kind: str) -> Line:
    points = [
        Point(row["ranks"], 1.0)
        if row[kind] is None
        else Point(row["ranks"], row[kind].value, row[kind].low, row[kind].high)
        for row in found
    ]
    return Line(label, tuple(sorted(points)), line_style(found[0]["result"]))


SCALING = Scaling(
    lambda results: [*plans_over_ranks.tables(results), *tables(results)],
    plans_over_ranks.FIGURES
    | {f"transformer_{phase}_vs_ranks": partial(by_ranks, phase=phase) for phase in HYBRID},
)
