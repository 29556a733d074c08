"""How attention grows with the sequence: time, memory and share of the matrix rate against T."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from tools.cases import Result, Results, grouped
from tools.drawing import series
from tools.drawing.chart import Absent, Axis, Drawing, Line
from tools.drawing.series import Sketch, Words
from tools.families.attention.points import PHASES, point_of
from tools.families.attention.speed import dense, groups_of, panels_of
from tools.tables import seconds, size

ENOUGH = 4  # lengths of a line


def time_vs_tokens(results: Results, phase: str) -> list[Drawing]:
    """Time against T, both logarithmic, with the floor; a panel for each D and mask."""
    caption = (
        "Median time of one call, as many queries as keys. Where batch and heads change with T, it "
        "is the time over their number: per head. Both axes are logarithmic. Dashed: the floor, "
        "the larger of arithmetic and memory traffic at the rates measured on this machine."
    )
    title = f"Attention, {PHASES[phase]}: time against sequence length"
    words = Words(f"attention_{phase}_vs_T", title, caption)
    axis = ("time", seconds, "log")
    found = dense(results, phase)
    return _against_tokens(results, found, phase, words, axis, lambda r: r.median, _floor)


def memory_vs_tokens(results: Results, phase: str) -> list[Drawing]:
    """Peak memory against T, with the inputs; a panel for each D."""
    caption = (
        "The most that was allocated during a call beside its inputs. Dashed: the inputs. "
        "What climbs as they do is linear in T; twice as steep, the method holds the scores. Lines "
        "that differ by less than 1.5% are one."
    )
    found = [r for r in dense(results, phase) if r.memory.get("peak_bytes")]
    # The mask changes nothing here: of each setting and D the one measured more is drawn.
    kinds = defaultdict(set)
    for result in found:
        kinds[_kind(result)] |= _lengths([result])
    most = {kind[:2]: kind for kind in sorted(kinds, key=lambda kind: (len(kinds[kind]), kind))}
    found = [r for r in found if _kind(r) == most[_kind(r)[:2]]]
    title = f"Attention, {PHASES[phase]}: memory against sequence length"
    words = Words(f"attention_{phase}_memory_vs_T", title, caption)
    axis = ("memory", size, "bytes")
    return _against_tokens(
        results, found, phase, words, axis, lambda r: r.memory["peak_bytes"], _inputs
    )


def matrix_share(results: Results, phase: str) -> list[Drawing]:
    """The share of the machine's matrix rate that each method reaches, against T."""
    found = [r for r in dense(results, phase) if "matrix_fraction" in r.rates]
    groups = groups_of(found, phase)
    for text, group in groups.items():
        panels = [Sketch(words, "T", _largest(panel)) for words, panel in panels_of(group)]
        groups[text] = [panel for panel in panels if len(_lengths(panel.results)) > 1]
    caption = (
        "Arithmetic of the pairs that attend, over the time, as a share of what a dense matrix "
        "product reaches on this machine. The softmax is not counted: it takes time and adds "
        "nothing here, so 100% is out of reach. At each length the batch with the most heads."
    )
    title = f"Attention, {PHASES[phase]}: share of the matrix rate"
    words = Words(f"attention_{phase}_matrix_share", title, caption)
    y = Axis("of the matrix rate (%)", "{:.1f}%".format, "even", 100)
    return _charts(results, groups, words, y, lambda r: 100 * r.rates["matrix_fraction"])


def _against_tokens(
    results: Results, found, phase: str, words: Words, axis: tuple, value: Callable, bound: Callable
) -> list[Drawing]:
    """Lines of a value against T, and what bounds it; a panel for each D and mask."""
    measured, write, scale = axis
    groups = groups_of(found, phase)
    for text, group in groups.items():
        panels, per_head = _comparable(panels_of(group))
        part = _heads if per_head else lambda _: 1
        y = Axis(f"{measured} per head" if per_head else f"{measured} of a call", write, scale)
        groups[text] = [
            Sketch(of, "T", panel, y, lambda r, part=part: value(r) / part(r), bound(panel, part))
            for of, panel in panels
        ]
    if not any(groups.values()):
        raise Absent("a line needs two values of T with as many queries as keys")
    return _charts(results, groups, words)


def _charts(results: Results, groups: dict, words: Words, *measured) -> list[Drawing]:
    options = {"x": lambda result, name: _length(result)}
    return series.charts(results, groups, words, *measured, **options)


def _comparable(panels: list[tuple]) -> tuple[list[tuple[str, list[Result]]], bool]:
    """(panels, whether a value is to be taken per head): the batch and heads that were measured at
    most lengths; where some panel has no batch with enough of them, all, to be taken per head.
    """
    fixed, every = [], [(words, _largest(panel)) for words, panel in panels]
    every = [(words, panel) for words, panel in every if len(_lengths(panel)) > 1]
    for words, panel in panels:
        square = [r for r in panel if point_of(r.case).square]
        groups = grouped(square, lambda r: (point_of(r.case).batch, point_of(r.case).heads))
        most = max(groups, key=lambda key: (len(_lengths(groups[key])), key), default=None)
        lengths = len(_lengths(groups[most])) if most else 0
        if lengths > 1 and lengths >= min(ENOUGH, len(_lengths(panel))):
            fixed.append((f"{words}, {most[0]} × {most[1]} heads", groups[most]))
    return (fixed, False) if len(fixed) >= len(every) else (every, True)


def _largest(panel: Sequence[Result]) -> list[Result]:
    """Of each length the results of the batch with the most heads, queries and keys alike."""
    square = [r for r in panel if point_of(r.case).square]
    most = {T: max(_heads(r) for r in square if _length(r) == T) for T in _lengths(square)}
    return [r for r in square if _heads(r) == most[_length(r)]]


def _floor(panel: Sequence[Result], part: Callable) -> list[Line]:
    floors = defaultdict(list)
    for r in panel:
        if r.floor.get("seconds", 0) > 0:
            floors[_length(r)].append(r.floor["seconds"] / part(r))
    return series.grey("floor", {T: min(values) for T, values in floors.items()})


def _inputs(panel: Sequence[Result], part: Callable) -> list[Line]:
    sizes = {_length(r): r.memory.get("input_bytes", 0) / part(r) for r in panel}
    return series.grey("inputs", {T: value for T, value in sizes.items() if value})


def _heads(result: Result) -> int:
    p = point_of(result.case)
    return p.batch * p.heads


def _length(result: Result) -> int:
    return point_of(result.case).Tq


def _lengths(panel: Sequence[Result]) -> set[int]:
    return {_length(r) for r in panel if point_of(r.case).square}


def _kind(result: Result) -> tuple:
    p = point_of(result.case)
    return p.setting, p.D, p.causal
