"""From judged points to a status and the words that say why.

    holds      at most of the points that decide, and nowhere the contrary
    fails      the contrary at most of them, and nowhere what is claimed
    mixed      both were seen: it depends on the size
    undecided  the points are unsure, too few, or test nothing

A point is judged as in tools.compare: a threshold and an interval that excludes 1. What each
hypothesis asks of its points is in hypotheses.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tools.judged import FAILS, HOLDS, MIXED, UNDECIDED
from tools.stats import Interval

NAMED = 3  # places that a sentence names; more are counted


@dataclass(frozen=True)
class Point:
    """One place in the grid: a ratio of times, below 1 where the line is faster than `against`.

    `of` is the line's result. H2 adds the ratio of the forward, the change from there (above 1: the
    advantage shrank), the share of upkeep, and what the ratio would be without upkeep.
    """

    N: int
    B: int
    of: str
    against: str
    ratio: Interval
    verdict: str
    note: str | None = None
    forward: Interval | None = None
    change: Interval | None = None
    upkeep: float | None = None
    without_upkeep: float | None = None


def agreed(points: list[Point], word: str) -> str:
    """Whether the points agree on `word` (faster, slower) or on its contrary; unsure ones are
    neither.
    """
    sure = [point.verdict == word for point in points if point.verdict != "unsure"]
    if len(sure) <= len(points) / 2:
        return MIXED if len(set(sure)) > 1 else UNDECIDED
    return MIXED if len(set(sure)) > 1 else HOLDS if sure[0] else FAILS


def everywhere(points: list[Point], word: str) -> tuple[str, str]:
    """Status and words where a claim is made of all sizes."""
    if not points:
        return UNDECIDED, "no point where both were measured"
    return agreed(points, word), told(points, word)


def large_enough(points: list[Point], word: str) -> tuple[str, str]:
    """Status and words where a claim is made of large enough N and B: those of the largest corner
    of the grid whose points agree. Where it is to hold, points of its largest N and of its largest
    B are among those. No finite set of points says more about "large enough".
    """
    if len(points) < 2:
        few = f"one point shows no trend: {told(points, word)}" if points else ""
        return UNDECIDED, few or everywhere(points, word)[1]
    found: dict[str, list[Point]] = {}
    for inside in corners(points):
        status = agreed(inside, word)
        found.setdefault(UNDECIDED if status == HOLDS and not reached(inside) else status, inside)
    decided = {HOLDS, FAILS} & set(found)
    if len(decided) != 1:
        mixed = decided or MIXED in found
        return MIXED if mixed else UNDECIDED, told(points, word)
    (status,) = decided
    return status, told(points, word, found[status])


def reached(inside: list[Point]) -> bool:
    """Whether a point of the largest N, and one of the largest B, is sure."""
    sure = [point for point in inside if point.verdict != "unsure"]
    most = {axis: max(getattr(point, axis) for point in inside) for axis in "NB"}
    return all(any(getattr(p, axis) == most[axis] for p in sure) for axis in "NB")


def corners(points: list[Point]) -> Iterator[list[Point]]:
    """The corners (N >= N0, B >= B0) of two points or more, the largest first. Each reaches the
    largest N and the largest B that were measured.
    """
    sizes, batches = ({getattr(p, axis) for p in points} for axis in "NB")
    made = [
        [p for p in points if least_n <= p.N and least_b <= p.B]
        for least_n in sorted(sizes)
        for least_b in sorted(batches)
    ]
    yield from (
        inside
        for inside in sorted(made, key=len, reverse=True)
        if len(inside) > 1
        and max(p.N for p in inside) == max(sizes)
        and max(p.B for p in inside) == max(batches)
    )


def training_verdict(change: str, forward: str, upkeep: float | None, small: float) -> str:
    """What a point of training says about an advantage that shrinks: see hypotheses.py, H2."""
    if upkeep is None or change == "unsure":
        return "unsure"
    shrinks = change == "slower"
    if forward != "faster":
        return "falls behind" if shrinks else "none to lose"
    return ("shrinks" if shrinks else "kept") + (" (small upkeep)" if upkeep <= small else "")


def shrinking(points: list[Point], small: float) -> tuple[str, str]:
    """H2's status and words. Only points with an advantage to lose and upkeep beyond `small` test
    the claim.
    """
    if not points:
        return UNDECIDED, "no point where the forward and dense training were measured as well"
    tests = [p for p in points if p.verdict in ("shrinks", "kept")]
    unsure = _count(points, "unsure")
    if tests:
        shrunk = _count(tests, "shrinks")
        status = MIXED if 0 < shrunk < len(tests) else HOLDS if shrunk else FAILS
        words = f"shrinks at {_of(shrunk, tests)} with an advantage and upkeep over "
        words += f"{100 * small:g}%"
        if status != MIXED and len(tests) <= unsure:
            status, words = UNDECIDED, f"{words}, but {_of(unsure, points)} are unsure"
    elif unsure > len(points) / 2:
        status, words = UNDECIDED, f"{_of(unsure, points)} are unsure"
    elif any("small" in p.verdict for p in points):
        status, words = UNDECIDED, "where it has an advantage, upkeep is small: nothing tests it"
    else:
        status, words = UNDECIDED, "it has no advantage in the forward that could shrink"
    shown = max(tests or points, key=lambda p: (p.N, p.B, p.upkeep or 0))
    words += f"; at N={shown.N} B={shown.B} ({shown.of}) the time ratio is "
    words += f"{shown.forward.value:.3f} in the forward, {shown.ratio.value:.3f} in training"
    return status, words


def told(points: list[Point], word: str, inside: list[Point] | None = None) -> str:
    """How many points are `word`, the range of their ratios, and where the others are."""
    inside = points if inside is None else inside
    where = ""
    if len(inside) < len(points):
        least = [(axis, min(getattr(p, axis) for p in inside)) for axis in "NB"]
        ends = [f"{a} ≥ {n}" for a, n in least if any(getattr(p, a) < n for p in points)]
        where = f" with {' and '.join(ends)}"
    ratios = [p.ratio.value for p in inside]
    text = f"{word} at {_of(_count(inside, word), inside)}{where}, "
    text += f"time ratio {min(ratios):.3f}" + f" to {max(ratios):.3f}" * (len(inside) > 1)
    for other in ("faster", "slower", "same", "unsure"):
        if other != word and (places := _places(inside, other)):
            text += f"; {other} at {places}"
    rest = [p for p in points if p not in inside]
    return text + (f"; elsewhere {word} at {_of(_count(rest, word), rest)}" if rest else "")


def _count(points: list[Point], word: str) -> int:
    return sum(p.verdict == word for p in points)


def _of(count: int, points: list[Point]) -> str:
    return f"{count or 'none'} of {len(points)} point{'s' * (len(points) > 1)}"


def _places(points: list[Point], word: str) -> str:
    """The places whose verdict is `word`; N alone where all its points are."""
    there = [p for p in points if p.verdict == word]
    if len(there) == len(points):
        return "all"
    others = {p.N for p in points if p.verdict != word}
    places = [f"N={p.N}" + f" B={p.B}" * (p.N in others) for p in there]
    places = list(dict.fromkeys(places))
    return ", ".join(places) if len(places) <= NAMED else str(len(there))
