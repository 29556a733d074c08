"""Answers, and what a process remembers of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from blockshock.tuning import sizes

MOST = 4096  # entries of a memory; beyond it the oldest are asked of the disk again


@dataclass(frozen=True)
class Answer:
    """One candidate by name. source: "measured", "kept" on disk, or why a rule decided; and of
    which other rows of its class, as in "measured, of B=100".

    seconds: of a call, by candidate, as far as they were measured; the runner-up is among them.
    took: seconds that measuring took just now.
    """

    name: str
    source: str
    seconds: dict[str, float] = field(default_factory=dict)
    took: float = 0.0

    def of(self, names: Iterable[str]) -> "Answer":
        """The fastest of these by the same times; the first one where a rule decided."""
        names = list(names)
        timed = [name for name in self.seconds if name in names]
        return replace(self, name=min(timed, key=self.seconds.get, default=names[0]))


@dataclass
class Memory:
    """Of a group, and alike on all its ranks.

    answers: by question. settled: by the question of a class, then by the rows that were measured,
    or decided by rule.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    settled: dict[str, dict[int, Answer]] = field(default_factory=dict)

    def settle(self, question: str, answer: Answer) -> None:
        """Keeps what was measured for the rows of a question, or decided by rule."""
        whole, rows = sizes.split(question)
        hold(self.settled, whole, self.settled.get(whole, {}))
        hold(self.settled[whole], rows, replace(answer, took=0.0))

    def settled_for(self, question: str) -> Answer | None:
        """What was settled for these very rows."""
        whole, rows = sizes.split(question)
        return self.settled.get(whole, {}).get(rows)

    def find(self, question: str, names: list[str], *, exact: bool) -> Answer | None:
        """What was settled for these rows, or else (not exact) for the nearest of their class.

        names: the candidates, of which it must be one.
        """
        whole, rows = sizes.split(question)
        settled = self.settled.get(whole, {})
        fit = [other for other in settled if settled[other].name in names]
        if rows in fit:
            return settled[rows]
        if exact or not fit:
            return None
        nearest = min(fit, key=lambda other: (abs(other - rows), other))
        answer = settled[nearest]
        if ", of B=" in answer.source:
            return answer
        return replace(answer, source=f"{answer.source}, of B={nearest}")


def hold(of_group: dict, key, value) -> None:
    """Sets an entry; the oldest one goes where there are MOST.

    Each group has entries of its own, so its ranks forget the same ones: a rank of several groups
    would otherwise ask in a collective where the others still know.
    """
    while len(of_group) >= MOST and key not in of_group:
        del of_group[next(iter(of_group))]
    of_group[key] = value
