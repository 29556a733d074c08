"""From results to lines: one for each label, a panel for each size, a drawing for each setting."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from tools.cases import Result, Results
from tools.drawing import style
from tools.drawing.chart import Absent, Axis, Drawing, Line, Panel, Point, merged
from tools.drawing.looks import line_style

Value = Callable[[Result], float | Point | None]


class Sketch(NamedTuple):
    """A panel before its lines are made. y, value: where they are not those of the whole figure;
    extra: lines of other things, such as a limit.
    """

    title: str
    x: str  # the name of its axis
    results: list[Result]
    y: Axis | None = None
    value: Value | None = None
    extra: Iterable[Line] = ()


class Words(NamedTuple):
    """What a figure is called, and how it is read."""

    name: str
    title: str
    caption: str


class Kind(NamedTuple):
    """What a family's figure shows. value: of (result, results of its point), or None."""

    title: str
    caption: str
    axis: Axis
    value: Callable[[Result, Sequence[Result]], float | Point | None]


def by_size(
    found: Sequence[Result], what: str, x: str = "N", most: int = 4, **options
) -> dict[str, list[Sketch]]:
    """The panels of each setting: against N, one for each B, or the other way round; of more than
    `most` the ends and some between. options: those of `style.settings`.

    Raises Absent where no setting has a line to draw.
    """
    other = "B" if x == "N" else "N"
    groups: dict[str, list[Sketch]] = {}
    reason = Absent("")
    for text, group in style.settings(found, what, **options).items():
        try:
            panels = style.spread(style.panels_over(group, x), most)
        except Absent as error:
            reason = error
            continue
        groups[text] = [Sketch(f"{other} = {value}", x, panel) for value, panel in panels]
    if not groups:
        raise reason
    return groups


def line(results: Sequence[Result], x: Callable[[Result], float], value: Value) -> Line:
    """The line of one label; a result without a value has no point."""
    points = []
    for result in results:
        y = value(result)
        if y is not None:
            points.append(y._replace(x=x(result)) if isinstance(y, Point) else Point(x(result), y))
    return Line(results[0].label, tuple(sorted(points, key=lambda p: p.x)), line_style(results[0]))


def charts(
    results: Results,
    groups: dict[str, list[Sketch]],
    words: Words,
    y: Axis | None = None,
    value: Value | None = None,
    *,
    x: Callable[..., float] = lambda result, name: getattr(result.case, name),
    main: Callable[[Sequence[Result]], set[str]] | None = None,
    **options,
) -> list[Drawing]:
    """A drawing for each setting. main: the labels of a setting that are drawn at first; options:
    those of Drawing.
    """
    drawings = []
    for text, sketches in groups.items():
        every = [result for sketch in sketches for result in sketch.results]
        shown = main(every) if main else {result.label for result in every}
        made = []
        for sketch in sketches:
            place = functools.partial(x, name=sketch.x)
            found = (line(one, place, sketch.value or value) for one in style.lines(sketch.results))
            lines = tuple(replace(one, main=one.label in shown) for one in found if one.points)
            made.append(Panel(sketch.title, lines, sketch.x, sketch.y or y))
        whole = [
            replace(panel, lines=(*panel.lines, *sketch.extra))
            for panel, sketch in zip(merged(made), sketches, strict=True)
            if panel.lines
        ]
        if whole:
            drawings.append(drawn(results, words, text, groups, whole, **options))
    if not drawings:
        raise Absent("no result has what it shows")
    return drawings


def drawn(
    results: Results, words: Words, text: str, groups: Iterable[str], panels, **options
) -> Drawing:
    """A Drawing of one setting; the first setting has the plain name."""
    name = style.file_name(words.name, text, groups)
    subtitle = " · ".join(part for part in (results.title, text) if part)
    options["setting"] = name != words.name
    return Drawing(name, words.title, subtitle, words.caption, tuple(panels), **options)


def grey(label: str, values: dict[float, float]) -> list[Line]:
    """A grey dashed line of what bounds the others; none without values."""
    look = {"color": style.FLOOR, "linestyle": (0, (4, 2)), "linewidth": 1.4, "zorder": 1}
    points = tuple(Point(x, y) for x, y in sorted(values.items()))
    return [Line(label, points, look, bound=True)] if points else []
