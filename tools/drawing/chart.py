"""A figure as plain data: panels of lines, and how it becomes a PNG or the SVG of a page.

A family says what is drawn; lines.py, bars.py and svg.py know how. Lines that no eye could tell
apart are one line: `merged` finds them for every figure, so that none lies hidden under another.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

SAME = 0.015  # lines that differ by less at every point are drawn as one


class Absent(Exception):
    """There is nothing to draw; the message says what is missing."""


class Point(NamedTuple):
    """A value at x, with the ends of its interval or whisker; `note` is shown with the value."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """The points of one label in one panel; `look` holds matplotlib's keywords.

    main: drawn in the PNG, and at first in the page, where the legend switches the others on.
    bound: no method but what bounds them, so it does not widen the axis.
    """

    label: str
    points: tuple[Point, ...]
    look: dict[str, Any] = field(default_factory=dict)
    main: bool = True
    bound: bool = False


@dataclass(frozen=True)
class Axis:
    """The y axis: label, how a value is written, scale ("log", "ratio", "even", "bytes"), a value
    to mark with a grey rule.
    """

    label: str
    write: Callable[[float], str]
    scale: str = "log"
    rule: float | None = None
    least: float = 0.9  # a ratio's axis begins here, or below where a value does


@dataclass(frozen=True)
class Panel:
    """One pair of axes; x is "N", "B", "T" or "step" (ticks.NAMES)."""

    title: str
    lines: tuple[Line, ...]
    x: str
    y: Axis
    names: tuple[str, ...] = ()  # of the bars: x is their place


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name (no suffix), title, subtitle, and a caption on how to read it.

    checks: belongs on the report's last page. setting: it is in another setting than the main one.
    draw: puts a panel on its axes, given the axes, the panel and the id of each label, and says
    where each line's points lie; None for lines.
    """

    name: str
    title: str
    subtitle: str
    caption: str
    panels: tuple[Panel, ...]
    columns: int = 2
    height: float = 2.9  # inches a panel
    checks: bool = False
    setting: bool = False
    draw: Callable | None = None

    @property
    def labels(self) -> list[str]:
        """The labels of all panels, in the order of the legend."""
        return list(dict.fromkeys(line.label for p in self.panels for line in p.lines))

    def only_main(self) -> "Drawing":
        """The same figure with the lines that are drawn at first."""
        panels = [
            replace(p, lines=tuple(line for line in p.lines if line.main)) for p in self.panels
        ]
        return replace(self, panels=tuple(p for p in panels if p.lines))


def merged(panels: Sequence[Panel]) -> tuple[Panel, ...]:
    """The panels with lines that coincide wherever both have points as one line that names each.

    The longest of them is the one that is drawn.
    """
    points: dict[str, dict[tuple[int, float], float]] = {}
    shown: set[str] = set()
    for i, panel in enumerate(panels):
        for line in panel.lines:
            points.setdefault(line.label, {}).update({(i, p.x): p.y for p in line.points})
            shown |= {line.label} if line.main else set()
    groups: list[list[str]] = []
    for label in sorted(points, key=lambda label: -len(points[label])):
        same = (group for group in groups if _covers(points[group[0]], points[label]))
        group = next(same, None)
        groups.append([label]) if group is None else group.append(label)
    order = list(points)
    names = {group[0]: " ≈ ".join(sorted(group, key=order.index)) for group in groups}
    main = {group[0]: bool(shown.intersection(group)) for group in groups}
    return tuple(
        replace(
            panel,
            lines=tuple(
                replace(line, label=names[line.label], main=main[line.label])
                for line in panel.lines
                if line.label in names
            ),
        )
        for panel in panels
    )


def _covers(drawn: dict, other: dict) -> bool:
    return other.keys() <= drawn.keys() and all(
        math.isclose(drawn[at], other[at], rel_tol=SAME) for at in other
    )
