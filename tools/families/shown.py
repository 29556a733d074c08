"""What a family shows in plots and reports."""

from collections.abc import Callable
from dataclasses import dataclass

from tools.cases import Results
from tools.drawing.chart import Drawing
from tools.tables import Table


@dataclass(frozen=True)
class Shown:
    """title: the family in words; question: what it asks; reading: (term, what it means).

    figures: the main one first; each gives its drawings, or raises Absent with the reason.
    tables: every case, in the tables of the report.
    """

    title: str
    question: str
    reading: tuple[tuple[str, str], ...]
    figures: dict[str, Callable[[Results], list[Drawing]]]
    tables: Callable[[Results], list[Table]]


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
