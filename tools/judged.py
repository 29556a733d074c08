"""A verdict: a claim, a sentence, and a judgement of each line against each opponent.

There is no status over all of them. What is true of one mask against one opponent is often false of
another, so each says its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tools.tables import Column, Table

STATUSES = HOLDS, FAILS, MIXED, UNDECIDED = "holds", "fails", "mixed", "undecided"


@dataclass(frozen=True)
class Judgement:
    """What the measured points of one line say against one opponent.

    words: why, with the figures. points: dataclasses with the fields that `Verdict.columns` name.
    decides: False where it is no part of the hypothesis, and is told as evidence only.
    """

    line: str
    opponent: str
    status: str
    words: str
    points: tuple[Any, ...] = ()
    decides: bool = True

    @property
    def title(self) -> str:
        """Who is compared with whom."""
        return f"{self.line} vs {self.opponent}"


@dataclass(frozen=True)
class Verdict:
    """A hypothesis. `sentence` says where it holds; each judgement says its own status."""

    name: str
    claim: str
    sentence: str
    judgements: tuple[Judgement, ...] = ()
    columns: tuple[Column, ...] = ()

    @property
    def deciding(self) -> list[Judgement]:
        """The judgements that are about the hypothesis."""
        return [judgement for judgement in self.judgements if judgement.decides]

    @property
    def beside(self) -> list[Judgement]:
        """The judgements of what was measured beside it: other kernels, other numbers of ranks."""
        return [judgement for judgement in self.judgements if not judgement.decides]

    def table(self, judgement: Judgement) -> Table:
        """The points of a judgement, a row each."""
        rows = [vars(point) for point in judgement.points]
        return Table(judgement.title, self.columns, rows, unit="points")


def sentence(judgements: Iterable[Judgement], needed: str) -> str:
    """Where a hypothesis holds and where it does not; or what has to be measured, `needed`."""
    lines: dict[str, dict[str, list[str]]] = {}
    for one in judgements:
        if one.decides:
            lines.setdefault(one.opponent, {}).setdefault(one.status, []).append(one.line)
    if not lines:
        return f"Not measured: it needs {needed}."
    parts = [
        ", ".join(
            f"{status} for {_listed(found[status])}" for status in STATUSES if status in found
        )
        + f" against {opponent}"
        for opponent, found in lines.items()
    ]
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def _listed(names: list[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
