"""How attention grows with the sequence: time, memory and share of the matrix rate against T."""

from collections import defaultdict
from collections.abc import Sequence

from matplotlib.axes import Axes

from tools.cases import Result, Results
from tools.drawing import style, ticks
from tools.drawing.style import Absent, Drawing
from tools.families.attention.points import PHASES, point_of
from tools.families.attention.speed import dense, drawing, groups_of, panels_of
from tools.families.linear import looks
from tools.tables import seconds

ENOUGH = 4  # lengths of a line


def time_vs_tokens(results: Results, phase: str) -> list[Drawing]:
    """Time against T, both logarithmic, with the floor; a panel for each D and mask."""
    title = f"Attention, {PHASES[phase]}: time against sequence length"
    caption = (
        "Median time of one call, as many queries as keys. Where batch and heads change with T, it "
        "is the time over their number: per head. Both axes are logarithmic. Dashed: the floor, "
        "the larger of arithmetic and memory traffic at the rates measured on this machine."
    )
    found = dense(results, phase)
    draw = (lambda r: r.median, _floor, lambda axes: ticks.log_axis(axes, seconds))
    return _against_tokens(results, found, phase, ("vs_T", "time", title, caption), draw)


def memory_vs_tokens(results: Results, phase: str) -> list[Drawing]:
    """Peak memory against T, with the inputs; a panel for each D and mask."""
    title = f"Attention, {PHASES[phase]}: memory against sequence length"
    caption = (
        "The most that was allocated during a call, inputs included; lines that coincide are moved "
        "a little sideways. Dotted: the inputs alone. What climbs as they do is linear in T; twice "
        "as steep, the method holds the scores."
    )
    found = [r for r in dense(results, phase) if r.memory.get("peak_bytes")]
    # The mask changes nothing here: of each setting and D the one measured more is drawn.
    kinds = defaultdict(set)
    for result in found:
        kinds[_kind(result)] |= _lengths([result])
    most = {kind[:2]: kind for kind in sorted(kinds, key=lambda kind: (len(kinds[kind]), kind))}
    found = [r for r in found if _kind(r) == most[_kind(r)[:2]]]
    draw = (lambda r: r.memory["peak_bytes"], _inputs, ticks.byte_axis)
    return _against_tokens(results, found, phase, ("memory_vs_T", "memory", title, caption), draw)


def matrix_share(results: Results, phase: str) -> list[Drawing]:
    """The share of the machine's matrix rate that each method reaches, against T."""
    title = f"Attention, {PHASES[phase]}: share of the matrix rate"
    found = [r for r in dense(results, phase) if "matrix_fraction" in r.rates]
    drawings = []
    for text, group in groups_of(found, phase).items():
        panels = [(words, _largest(panel)) for words, panel in panels_of(group)]
        panels = [(words, panel) for words, panel in panels if len(_lengths(panel)) > 1]
        if not panels:
            continue
        canvas = style.canvas(*style.folded(len(panels), 2), sharey=True)
        top = 100 * max(r.rates["matrix_fraction"] for _, panel in panels for r in panel)
        for axes, (words, panel) in style.placed(canvas, panels):
            axes.set_title(words)
            axes.axhline(100, color=style.FLOOR, linewidth=1.2)
            for line in style.lines(panel):
                line = sorted(line, key=_length)
                shares = [100 * r.rates["matrix_fraction"] for r in line]
                axes.plot([_length(r) for r in line], shares, **looks.line_style(line[0]))
            _tokens_axis(axes, panel)
            axes.set_ylim(0, 1.05 * max(100, top))
        for row in canvas.axes:
            row[0].set_ylabel("of the matrix rate (%)")
        caption = (
            "Arithmetic of the pairs that attend, over the time, as a share of what a dense matrix "
            "product reaches on this machine. The softmax is not counted: it takes time and adds "
            "nothing here, so 100% is out of reach. At each length the batch with the most heads."
        )
        figure = style.finish(canvas, title, results, text)
        name = f"attention_{phase}_matrix_share"
        drawings.append(drawing(name, text, drawings, (title, caption, figure)))
    if not drawings:
        raise Absent("a line needs two values of T with as many queries as keys, and their rates")
    return drawings


def _against_tokens(results: Results, found, phase: str, words, draw) -> list[Drawing]:
    """Lines of a value against T, and a grey line beside; a panel for each D and mask.

    draw: the value of a result, the function that draws the grey line, and that of the y axis.
    """
    name, measured, title, caption = words
    value, beside, axis = draw
    drawings = []
    for text, group in groups_of(found, phase).items():
        panels, per_head = _comparable([(words, panel) for words, panel in panels_of(group)])
        if not panels:
            continue
        canvas = style.canvas(*style.folded(len(panels), 2), height=3.2)
        part = _heads if per_head else lambda _: 1
        for axes, (of, panel) in style.placed(canvas, panels):
            axes.set_title(of)
            lines = style.lines(panel)
            for i, line in enumerate(lines):
                line = sorted(line, key=_length)
                aside = style.beside(i, len(lines)) if measured == "memory" else 1
                where, values = (
                    [aside * _length(r) for r in line],
                    [value(r) / part(r) for r in line],
                )
                axes.plot(where, values, **looks.line_style(line[0]))
            beside(axes, panel, part)
            _tokens_axis(axes, panel)
            axis(axes)
        for row in canvas.axes:
            row[0].set_ylabel(f"{measured} per head" if per_head else f"{measured} of a call")
        figure = style.finish(canvas, title, results, text)
        name_ = f"attention_{phase}_{name}"
        drawings.append(drawing(name_, text, drawings, (title, caption, figure)))
    if not drawings:
        raise Absent("a line needs two values of T with as many queries as keys")
    return drawings


def _comparable(panels: list[tuple]) -> tuple[list[tuple[str, list[Result]]], bool]:
    """(panels, whether a value is to be taken per head): the batch and heads that were measured at
    most lengths; where some panel has no batch with enough of them, all, to be taken per head.
    """
    fixed, every = [], [(words, _largest(panel)) for words, panel in panels]
    every = [(words, panel) for words, panel in every if len(_lengths(panel)) > 1]
    for words, panel in panels:
        groups = defaultdict(list)
        for result in panel:
            p = point_of(result.case)
            if p.square:
                groups[p.batch, p.heads].append(result)
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


def _floor(axes: Axes, panel: Sequence[Result], part) -> None:
    floors = defaultdict(list)
    for r in panel:
        if r.floor.get("seconds", 0) > 0:
            floors[_length(r)].append(r.floor["seconds"] / part(r))
    look = {"linestyle": (0, (4, 2)), "linewidth": 1.4, "label": "floor"}
    _grey(axes, {T: min(values) for T, values in floors.items()}, look)


def _inputs(axes: Axes, panel: Sequence[Result], part) -> None:
    sizes = {_length(r): r.memory.get("input_bytes", 0) / part(r) for r in panel}
    look = {"linestyle": (0, (1, 1.4)), "linewidth": 1.8, "label": "inputs"}
    _grey(axes, {T: value for T, value in sizes.items() if value}, look)


def _grey(axes: Axes, values: dict[int, float], look: dict) -> None:
    if values:
        where = sorted(values)
        axes.plot(where, [values[T] for T in where], color=style.FLOOR, zorder=1, **look)


def _tokens_axis(axes: Axes, panel: Sequence[Result]) -> None:
    ticks.size_axis(axes, "T (queries and keys)", _lengths(panel))


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
