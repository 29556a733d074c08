"""What a family shows in plots, reports, verdicts and the README."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tools.cases import Results
from tools.drawing.chart import Drawing
from tools.families.judged import Verdict
from tools.tables import Table

README_ROWS, README_COLUMNS = 8, 8


@dataclass(frozen=True)
class Written:
    """A Markdown table with what it shows, in sentences, and the setting of its cases."""

    words: str
    setting: str
    table: str


@dataclass(frozen=True)
class Shown:
    """title: the family in words; question: what it asks; reading: (term, what it means).

    figures: the main one first; each gives its drawings, or raises Absent with the reason.
    tables: every case, in the tables of the report. judge: the verdicts on its hypotheses at a
    threshold; None without a hypothesis. readme: one table of at most README_ROWS and
    README_COLUMNS, or None where nothing fits. full: every table of results/README.md.
    """

    title: str
    question: str
    reading: tuple[tuple[str, str], ...]
    figures: dict[str, Callable[[Results], list[Drawing]]]
    tables: Callable[[Results], list[Table]]
    judge: Callable[[Results, float], list[Verdict]] | None = None
    readme: Callable[[Results], Written | None] = lambda results: None
    full: Callable[[Results], list[Written]] = lambda results: []


def spread(items: Sequence, most: int) -> list:
    """At most so many of the items: the first, the last, and evenly between them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(most - 1, 1))] for i in range(most)]


TIMES = (
    (
        "Times",
        "medians over all rounds of a case; of the ranks, the slowest counts. No time is given for "
        "a case whose correctness check failed.",
    ),
    (
        "A ratio",
        "comes with its 95% interval, from a bootstrap over blocks of consecutive rounds.",
    ),
    (
        "faster, slower",
        "need both: a difference beyond the threshold and an interval that excludes 1. same means "
        "that the whole interval lies within the threshold. The rest is unsure.",
    ),
    (
        "The floor",
        "is the least time this machine could take: the largest of arithmetic, memory and wire "
        "traffic at their measured rates.",
    ),
    (
        "Intervals",
        "speak of one run. Between runs times move by a few percent, ratios of methods that were "
        "measured interleaved hardly at all.",
    ),
)
