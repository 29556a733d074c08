"""A family: what a reader sees of its results in plots, reports, verdicts and the README."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tools.case_table import case_table
from tools.cases import PLAIN, Naming, Results
from tools.drawing.chart import Absent, Drawing
from tools.judged import Verdict
from tools.tables import Table

README_ROWS, README_COLUMNS = 8, 8
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


@dataclass(frozen=True)
class Written:
    """A Markdown table with what it shows, in sentences, and the setting of its cases."""

    words: str
    setting: str
    table: str


@dataclass(frozen=True)
class Scaling:
    """What a family shows over ranks, given results in which an id is there once for each number of
    ranks. tables: with `ranks` as a column, none where nothing was measured on two numbers of them.
    figures: as those of a family.
    """

    tables: Callable[[Results], list[Written]]
    figures: dict[str, Callable[[Results], list[Drawing]]]


@dataclass(frozen=True)
class Family:
    """title: the family in words; question: what it asks; reading: (term, what it means).

    figures: the main one first; each gives its drawings, or raises Absent with the reason.
    tables: every case, in the tables of the report.
    judge: the verdicts on its hypotheses at a threshold; None without a hypothesis. readme: one
    table of at most README_ROWS and README_COLUMNS, or None where nothing fits. full: every table
    of results/README.md. naming: how its cases are named, ordered and compared. scaling: None where
    ranks are not compared.

    Each is given the results of this family alone. The defaults serve a family that the tools do
    not know.
    """

    title: str
    question: str = ""
    reading: tuple[tuple[str, str], ...] = TIMES
    figures: dict[str, Callable[[Results], list[Drawing]]] = field(default_factory=dict)
    tables: Callable[[Results], list[Table]] = lambda results: [
        case_table("Times of every case", results.results)
    ]
    judge: Callable[[Results, float], list[Verdict]] | None = None
    readme: Callable[[Results], Written | None] = lambda results: None
    full: Callable[[Results], list[Written]] = lambda results: []
    naming: Naming = PLAIN
    scaling: Scaling | None = None


def draw_all(results: Results, family: Family | Scaling) -> tuple[list[Drawing], dict[str, str]]:
    """Every figure of a family that has data, in order, and the others with the reason."""
    drawings: list[Drawing] = []
    absent: dict[str, str] = {}
    for name, draw in family.figures.items():
        try:
            drawings += draw(results)
        except Absent as reason:
            absent[name] = str(reason)
    return drawings, absent
