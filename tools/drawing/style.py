"""Colours, type and text of every figure, and which lines and settings a figure holds.

INK, MUTED, GRID and PAPER occur for nothing else, so that the report can replace them in an SVG by
the colours of its theme.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from tools.cases import Result, grouped, order
from tools.drawing.chart import Absent

INK, MUTED, GRID, PAPER = "#1b1f24", "#59636e", "#dce1e6", "#fffffe"
FLOOR = "#8a939c"
MOST_LINES = 12

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
    "svg.fonttype": "none",
}


def settings(
    results: Iterable[Result],
    phase: str,
    main: Callable[[Sequence[Result]], set[str]] = lambda group: set(),
) -> dict[str, list[Result]]:
    """The results of each setting, the setting with the most results first.

    Raises Absent when there are none. With more lines than a panel carries, unusual variants go,
    the labels of `main` last, and the text says that some are left out.
    """

    def setting(result: Result) -> str:
        # Where nothing but a bias is trained is a question of its own.
        return result.setting + (", weights frozen" if result.case.policy == "frozen" else "")

    groups = grouped(results, setting)
    if not groups:
        raise Absent(f"no results of {phase}")
    ranked = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    few = [(text, *_few_lines(sorted(group, key=order), main(group))) for text, group in ranked]
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
    panels = grouped(results, lambda result: getattr(result.case, other))
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
    return [values[round(i * (len(values) - 1) / max(most - 1, 1))] for i in range(most)]


def lines(results: Iterable[Result]) -> list[list[Result]]:
    """The results of a panel, one list for each label, in the order of legends."""
    ordered = sorted(results, key=lambda r: (r.line_order, r.label))
    return list(grouped(ordered, lambda r: r.label).values())


def _few_lines(results: list[Result], main: set[str]) -> tuple[list[Result], str]:
    """As many lines as a panel carries, those with the fewest variants first, and the words for it
    where some are left out.
    """
    ranked = sorted(results, key=lambda r: (r.label not in main, r.line_order[::-1], r.id))
    labels = list(dict.fromkeys(result.label for result in ranked))
    kept = labels[:MOST_LINES]
    words = "; the other lines are in the tables"  # how many are drawn, the legend decides
    left = [result for result in results if result.label in kept]
    return left, words if len(kept) < len(labels) else ""
