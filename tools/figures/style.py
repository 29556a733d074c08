"""How every figure looks: one colour and marker per method, panels, axes, legends, files.

The colours are those of Okabe and Ito, which the colour-blind tell apart; markers and dashes say
the same again. A method keeps its colour and marker in every figure, a policy or an unusual mask
its dashes. INK, MUTED, GRID and PAPER occur for nothing else, so that the report can replace them
in an SVG by the colours of its theme.
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
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from tools.cases import Result, Results, method_order, order, setting_text
from tools.tables import count

INK, MUTED, GRID, PAPER = "#1b1f24", "#59636e", "#dce1e6", "#fffffe"
FLOOR = "#8a939c"

METHOD_STYLES = {
    "dense_single": ("#7a7f87", "s"),
    "dense_tp_row": ("#0072b2", "o"),
    "dense_tp_column": ("#56b4e9", "^"),
    "masked_split": ("#cc79a7", "D"),
    "block_shock": ("#d55e00", "P"),
    "block_shock_folded": ("#009e73", "X"),
}
# For methods that are not known here, by name.
SPARE_STYLES = (
    ("#e69f00", "v"),
    ("#882255", "<"),
    ("#44aa99", ">"),
    ("#332288", "p"),
    ("#999933", "h"),
    ("#aa4499", "*"),
)
DASHES = {
    "frozen": (0, (1, 1.2)),
    "dense_master": (0, (5, 2)),
    "packed_master": "solid",
    "1100": (0, (6, 1.5, 1, 1.5)),
    "1010": (0, (3, 1, 1, 1)),
    "1001": (0, (3, 1, 1, 1, 1, 1)),
    "random": (0, (2, 1)),
    "magnitude": (0, (4, 1)),
    "tile": (0, (7, 2)),
    "tile_magnitude": (0, (5, 1, 2, 1)),
}
MOST_LINES = 10

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

    Raises Absent when there are none. With more lines than a panel carries, unusual masks go.
    """
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        # Where nothing but a bias is trained is a question of its own.
        frozen = ", weights frozen" if result.case.policy == "frozen" else ""
        groups[setting_text(result.case) + frozen].append(result)
    if not groups:
        raise Absent(f"no {phase} results")
    ranked = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {text: _few_lines(sorted(group, key=order)) for text, group in ranked}


def file_name(name: str, text: str, groups: Iterable[str]) -> str:
    """The main setting has the plain name, the others a suffix."""
    if text == next(iter(groups)):
        return name
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


def canvas(rows: int, columns: int, *, height: float = 2.9, width: float = 3.6, **share) -> Canvas:
    """A grid of axes; a single column is drawn wider."""
    width = 7.2 if columns == 1 else 4.6 if columns == 2 else width
    figure = Figure(figsize=(max(6.4, width * columns), height * rows + 1.15), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **share)
    return Canvas(figure, [list(row) for row in axes])


def folded(count_: int, most: int = 4) -> tuple[int, int]:
    """Bands and columns for `count_` panels side by side."""
    columns = count_ if count_ <= most else math.ceil(count_ / math.ceil(count_ / most))
    return math.ceil(count_ / columns), columns


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


def line_style(result: Result) -> dict:
    """Colour, marker, dashes and label of a result's line."""
    method = result.case.method
    if method in METHOD_STYLES:
        colour, marker = METHOD_STYLES[method]
    else:
        colour, marker = SPARE_STYLES[sum(method.encode()) % len(SPARE_STYLES)]
    mask = result.case.mask if result.case.mask != result.usual_mask else None
    policy = result.case.policy if result.case.phase == "training" else None
    # Earlier methods are drawn wider, so that lines which coincide are all seen.
    place = min(method_order(method)[0], 5)
    return {
        "color": colour,
        "marker": marker,
        "linestyle": DASHES.get(policy) or DASHES.get(mask) or "solid",
        "linewidth": 2.9 - 0.3 * place,
        "markersize": 9 - 0.4 * place,
        "label": result.label,
    }


def lines(results: Iterable[Result]) -> list[list[Result]]:
    """The results of a panel, one list for each label, in the order of legends."""
    found: dict[str, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda r: (order(r)[-2], r.label)):
        found[result.label].append(result)
    return list(found.values())


def size_axis(axes: Axes, name: str, values: Iterable[int], *, label: bool = True) -> None:
    """A log axis with ticks at the measured sizes and nowhere else."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    if len(ticks) > 5:
        axes.tick_params(axis="x", labelrotation=45)
    if label:
        words = {"N": "N (weight N×N)", "B": "B (tokens)"}
        axes.set_xlabel(words.get(name, name))


def beside(place: int, count_: int) -> float:
    """The factor that moves line `place` of `count_` sideways on a size axis, so all are seen."""
    return 1.025 ** (place - (count_ - 1) / 2)


def log_axis(axes: Axes, write=count, limits: tuple[float, float] | None = None) -> None:
    """A log y axis with plain numbers as ticks, three at least.

    limits: of an axis that does not know its own yet.
    """
    axes.set_yscale("log")
    low, high = limits or axes.get_ylim()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _trimmed(write(value))))
    decades = [10.0**d for d in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 2, 3, 5, 7), range(1, 10)):
        ticks = [step * decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(low, high)


def _trimmed(text: str) -> str:
    number, space, unit = text.partition(" ")
    if "." in number and "e" not in number:
        number = number.rstrip("0").rstrip(".")
    return number + space + unit


def _few_lines(results: list[Result]) -> list[Result]:
    if len({result.label for result in results}) <= MOST_LINES:
        return results
    return [
        result
        for result in results
        if result.case.mask in (None, result.usual_mask or result.case.mask)
    ]
