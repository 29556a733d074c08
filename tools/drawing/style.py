"""How every figure is laid out: settings, panels, legends, files.

INK, MUTED, GRID and PAPER occur for nothing else, so that the report can replace them in an SVG by
the colours of its theme.
"""

import io
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.cases import Result, Results, order, setting_text
from tools.families.linear.looks import PAPER

INK, MUTED, GRID = "#1b1f24", "#59636e", "#dce1e6"
FLOOR = "#8a939c"
MOST_LINES = 14

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlecolor": INK,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.markeredgecolor": PAPER,
    "lines.markeredgewidth": 0.7,
    # A name from a file is a name, never mathematics.
    "text.parse_math": False,
    "svg.hashsalt": "block-shock",
    "svg.fonttype": "path",
}


class Absent(Exception):
    """There is nothing to draw; the message says what is missing."""


@dataclass(frozen=True)
class Drawing:
    """A figure with its file name (no suffix), title, and a caption that says how to read it."""

    name: str
    title: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """The figure as PNG, 150 dots an inch."""
        return self._saved("png", dpi=150)

    def svg(self) -> bytes:
        """The figure as SVG; the same results give the same bytes."""
        return self._saved("svg", metadata={"Date": None})

    def _saved(self, kind: str, **options) -> bytes:
        out = io.BytesIO()
        with matplotlib.rc_context(RC):
            self.figure.savefig(out, format=kind, facecolor=PAPER, **options)
        return out.getvalue()


@dataclass
class Canvas:
    """A figure with its grid of axes while it is being drawn."""

    figure: Figure
    axes: list[list[Axes]]


def settings(results: Iterable[Result], phase: str) -> dict[str, list[Result]]:
    """The results of each setting, the setting with the most results first.

    Raises Absent when there are none. With more lines than a panel carries, unusual variants go,
    and the text says how many lines are left.
    """
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        # Where nothing but a bias is trained is a question of its own.
        frozen = ", weights frozen" if result.case.policy == "frozen" else ""
        groups[setting_text(result.case) + frozen].append(result)
    if not groups:
        raise Absent(f"no {phase} results")
    ranked = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    few = [(text, *_few_lines(sorted(group, key=order))) for text, group in ranked]
    return {text + left: group for text, group, left in few}


def file_name(name: str, text: str, groups: Iterable[str]) -> str:
    """The main setting has the plain name, the others a suffix."""
    if text == next(iter(groups)):
        return name
    text = text.partition("; ")[0]
    return f"{name}_" + re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def panels_over(results: Sequence[Result], x: str) -> list[tuple[int, list[Result]]]:
    """One panel for each value of the size that is not on the x axis, with two x values at least.

    Raises Absent where every panel would have a single x.
    """
    other = "B" if x == "N" else "N"
    panels: dict[int, list[Result]] = defaultdict(list)
    for result in results:
        panels[getattr(result.case, other)].append(result)
    kept = [
        (value, panel)
        for value, panel in sorted(panels.items())
        if len({getattr(result.case, x) for result in panel}) > 1
    ]
    if not kept:
        raise Absent(f"a line needs two values of {x} or more with the same {other}")
    return kept


def spread(values: list, most: int) -> list:
    """At most `most` of the values: the ends, and evenly between."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def canvas(rows: int, columns: int, *, height: float = 2.9, width: float = 3.6, **share) -> Canvas:
    """A grid of axes, each at least so wide; one or two columns are drawn wider."""
    width = max(width, {1: 7.2, 2: 4.6}.get(columns, 0))
    figure = Figure(figsize=(max(6.4, width * columns), height * rows + 1.15), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **share)
    return Canvas(figure, [list(row) for row in axes])


def folded(count_: int, most: int = 4) -> tuple[int, int]:
    """Bands and columns for `count_` panels side by side."""
    columns = count_ if count_ <= most else math.ceil(count_ / math.ceil(count_ / most))
    return math.ceil(count_ / columns), columns


def placed(canvas_: Canvas, panels: Sequence) -> list[tuple]:
    """Each panel with its axes, row by row; axes without a panel are hidden."""
    axes = [one for row in canvas_.axes for one in row]
    for unused in axes[len(panels) :]:
        unused.set_visible(False)
    return list(zip(axes, panels, strict=False))


def finish(canvas_: Canvas, title: str, results: Results, text: str) -> Figure:
    """The title with device and setting, and one legend below all panels."""
    figure = canvas_.figure
    figure.suptitle(f"{title}\n", x=0.012, ha="left", fontsize=13.5, fontweight="bold")
    subtitle = " · ".join(part for part in (results.title, text) if part)
    # Hung from the top edge, in the second line that the title keeps free.
    top = 1 - 0.39 / figure.get_figheight()
    figure.text(0.012, top, subtitle, color=MUTED, ha="left", va="center")
    entries: dict[str, object] = {}
    for axes in (axes for row in canvas_.axes for axes in row):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        # Inches: the sample of the line, the longest label at 9.5 points, and a gap.
        widest = 0.62 + 0.068 * max(map(len, entries))
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower left",
            ncols=min(len(entries), max(1, int((figure.get_figwidth() - 0.2) / widest))),
            handlelength=2.6,
            columnspacing=1.6,
        )
    # The layout is found once, not for each file anew.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def lines(results: Iterable[Result]) -> list[list[Result]]:
    """The results of a panel, one list for each label, in the order of legends."""
    found: dict[str, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda r: (order(r)[-2], r.label)):
        found[result.label].append(result)
    return list(found.values())


def beside(place: int, count_: int) -> float:
    """The factor that moves line `place` of `count_` sideways on a size axis, so all are seen."""
    step = min(1.025, 1.15 ** (1 / max(1, count_ - 1)))
    return step ** (place - (count_ - 1) / 2)


def _few_lines(results: list[Result]) -> tuple[list[Result], str]:
    """As many lines as a panel carries, and the words for it where some are left out."""
    count_ = len({result.label for result in results})
    if count_ <= MOST_LINES:
        return results, ""
    left = results
    for keeps in (
        lambda r: len(r.unusual) <= 2,
        # Another sum of the methods that choose theirs; how dense methods do with it stays.
        lambda r: "reduce" not in r.unusual or r.usual.get("reduce") == "collective",
        lambda r: len(r.unusual) <= 1,
        lambda r: "mask" not in r.unusual,
        lambda r: not r.unusual,
    ):
        left = [result for result in results if keeps(result)] or left
        if len({result.label for result in left}) <= MOST_LINES:
            break
    kept = len({result.label for result in left})
    words = f"; {kept} of {count_} lines, the others are in the tables"
    return left, words if kept < count_ else ""
