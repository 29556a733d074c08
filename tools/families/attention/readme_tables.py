"""What attention shows in Markdown: the README's one table, and all of results/README.md.

All ratios are of speed: above 1 the first method named is the faster.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from tools.cases import Result, Results, fastest
from tools.drawing.style import spread
from tools.families.attention.points import (
    FLEX,
    NAMING,
    OURS,
    PEERS,
    PHASES,
    SPARSE,
    UNPRUNED,
    attention,
    by_point,
    by_setting,
    place_order,
    point_of,
    speed,
)
from tools.families.attention.tables import PLACE, RATIO_COLUMNS, place, ratio_rows
from tools.family import README_ROWS, Written
from tools.tables import (
    Column,
    as_markdown,
    figure,
    filled,
    interval,
    milliseconds,
    number,
    percent,
)


def _time(result: Result) -> str:
    return f"{milliseconds(result.median)} ({result.case.method})"


MOST_ROWS, OF_A_KIND = 40, 3
SPEEDS = "ratios of speed with their 95% intervals, above 1 the first is the faster"
PATTERN = (Column("mask", "pattern"), *PLACE[1:4])
PATTERN_TIMES = (
    *PATTERN,
    number("sparsity", "s", percent),
    number("touched_sparsity", "s of tiles", percent),
    number("dense", "dense", _time),
    *(number(method, method, lambda r: milliseconds(r.median)) for method in (FLEX, SPARSE)),
)
PATTERN_RATIOS = (
    *PATTERN,
    *RATIO_COLUMNS[2:],
    number(f"{SPARSE} / dense", f"{SPARSE} / dense", interval),
    number(f"{SPARSE} ideal", "ideal", figure),
    number(f"{SPARSE} of ideal", "of ideal", percent),
)


def readme(results: Results) -> Written | None:
    """The README's table: our kernels beside the fastest of PyTorch's at chosen points of the
    forward, half of them with a pattern; None where none were measured together.
    """
    text, found = next(iter(by_setting(attention(results, "forward")).items()), ("", []))
    kinds: dict[bool, list[dict]] = {False: [], True: []}
    points = by_point(sorted(found, key=_by_size))
    most = max((point.D for point in points), default=None)
    for point, methods in points.items():
        mine = methods.get(SPARSE if point.pattern else OURS)
        theirs = fastest(r for name, r in methods.items() if name in PEERS)
        if mine and theirs and point.square and most == point.D:
            cells = {"ours": mine, "theirs": theirs, "ratio": speed(mine, theirs)}
            kinds[point.pattern is not None].append(place(point) | cells)
    rows = [row for kind in kinds.values() for row in spread(kind, README_ROWS // 2)]
    columns = [
        *PLACE[1:],
        number("theirs", "PyTorch's fastest, ms", _time),
        number("ours", "ours, ms", _time),
        number("ratio", "speed: ours / PyTorch's", interval),
    ]
    words = (
        f"Attention, forward: median ms of {results.clock}, of PyTorch's fastest kernel for this "
        f"mask ({', '.join(PEERS)}) and of ours. Ratios are of speed with their 95% intervals: "
        f"above 1 ours is faster. Rows: D = {most}; {README_ROWS // 2} points without a pattern "
        f"and {README_ROWS // 2} with one, spread over those measured, in order of size."
    )
    return Written(words, text, _markdown(columns, rows)) if rows else None


def full(results: Results) -> list[Written]:
    """Dense attention and patterns, phase by phase, of the setting with the most results: what was
    measured, then ratios.
    """
    text, found = next(iter(by_setting(attention(results)).items()), ("", []))
    made = []
    for phase, what in PHASES.items():
        here = [r for r in found if r.case.phase == phase]
        dense = [r for r in here if point_of(r.case).pattern is None]
        few, left = _few(dense)
        rows = ratio_rows(few, here)
        words = f"Attention, {what}: TFLOP/s of the pairs that attend{left}, in {results.clock}."
        made.append((words, [*PLACE, *_rates(rows)], rows))
        made.append((f"Attention, {what}: {SPEEDS}.", (*PLACE, *RATIO_COLUMNS), rows))
        patterns = [r for r in here if point_of(r.case).pattern is not None]
        patterns = [r for r in patterns if r.case.method in (FLEX, SPARSE, UNPRUNED)]
        rows = ratio_rows(sorted(patterns, key=_by_size), here)
        words = (
            f"Attention with patterns, {what}: median ms of {results.clock}. s: sparsity of the "
            f"pairs, and of the tiles that {SPARSE} touches. dense: the fastest kernel of this run "
            "without the pattern, a causal one where the pattern is causal."
        )
        made.append((words, PATTERN_TIMES, rows))
        words = f"Attention with patterns, {what}: {SPEEDS}. ideal: 1 / (1 - s) of the tiles."
        made.append((words, PATTERN_RATIOS, rows))
    tables = [Written(words, text, _markdown(columns, rows)) for words, columns, rows in made]
    return [written for written in tables if written.table]


def _by_size(result: Result) -> tuple:
    """Orders patterns as if they were of one tier, which their table does not show."""
    return place_order(replace(point_of(result.case), tier=""))


def _rates(rows: list[dict]) -> list[Column]:
    methods = {key for row in rows for key, cell in row.items() if isinstance(cell, Result)}
    return [number(method, method, _rate) for method in sorted(methods, key=NAMING.place)]


def _markdown(columns: Sequence[Column], rows: list[dict]) -> str:
    """Markdown without empty columns; empty where only the places are left."""
    shown = filled(columns, rows)
    told = {c.key for c in shown} - {c.key for c in (*PLACE, *PATTERN)}
    return as_markdown(shown, rows) if told else ""


def _rate(result: Result) -> str:
    rate = result.rates.get("tflops")
    return "–" if rate is None else figure(rate)


def _few(results: Sequence[Result]) -> tuple[list[Result], str]:
    """The results at as many points as a table carries, and words for those left out: the first,
    the middle and the last of each tier, D and mask.
    """
    points = list(by_point(results))
    if len(points) <= MOST_ROWS:
        return list(results), ""
    kinds = defaultdict(list)
    for point in points:
        kinds[point.tier, point.D, point.causal].append(point)
    kept = {point for kind in kinds.values() for point in spread(kind, OF_A_KIND)}
    shown = [r for r in results if point_of(r.case) in kept]
    return shown, f" ({len(kept)} of {len(points)} points; the report has the others)"
