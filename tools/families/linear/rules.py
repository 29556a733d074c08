"""From judged points to a status: holds, fails or undecided, and the sentence that says why.

Each rule takes the points of one method in one setting; what they mean for the hypotheses is in
hypotheses.py.
"""

from collections import defaultdict
from dataclasses import dataclass

from tools.stats import Interval

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
# Verdicts of H2 as the predicate of one point, and of several.
PREDICATES = {
    "shrinks": ("shrinks", "shrink"),
    "kept": ("keeps it", "keep it"),
    "falls behind": ("falls behind", "fall behind"),
    "none to lose": ("has none to lose", "have none to lose"),
}


@dataclass(frozen=True)
class Point:
    """One place in the grid: a ratio of times, below 1 where the first method is the faster.

    `against` is the dense line that was the better one, `of` the line and setting that the point
    is of. H2 adds the forward's ratio, the change
    from it (above 1: the advantage shrank), the share of upkeep, and what the ratio would be
    without upkeep.
    """

    N: int
    B: int
    ratio: Interval
    verdict: str
    note: str = ""
    against: str = ""
    forward: Interval | None = None
    change: Interval | None = None
    upkeep: float | None = None
    without_upkeep: float | None = None
    of: str = ""


def corner(verdicts: dict[tuple[int, int], str], wanted: set[str]) -> set[tuple[int, int]]:
    """The largest corner (N >= N0, B >= B0) whose every point is in `wanted`; empty where none is.

    It has two points at least and reaches the largest N and the largest B that were measured, so a
    corner that is faster and one that is not can never both be found.
    """
    if not verdicts:
        return set()
    most_n, most_b = (max(size) for size in zip(*verdicts, strict=True))
    best: set[tuple[int, int]] = set()
    for n0 in {n for n, _ in verdicts}:
        for b0 in {b for _, b in verdicts}:
            inside = {(n, b) for n, b in verdicts if n >= n0 and b >= b0}
            reaches = any(n == most_n for n, _ in inside) and any(b == most_b for _, b in inside)
            agree = all(verdicts[point] in wanted for point in inside)
            if reaches and agree and len(inside) >= 2 and len(inside) > len(best):
                best = inside
    return best


def training_verdict(change: str, forward: str, upkeep: float | None, small: float) -> str:
    """What a point of training says: see hypotheses.py, H2."""
    if upkeep is None or change == "unsure":
        return "unsure"
    shrinks = change == "slower"
    if forward == "faster":
        word = "shrinks" if shrinks else "kept"
    else:
        word = "falls behind" if shrinks else "none to lose"
    return f"{word} (small upkeep)" if upkeep <= small else word


def corner_status(points: list[Point]) -> tuple[str, str]:
    """H1: a corner of the grid is faster everywhere, or nowhere."""
    if not points:
        return UNDECIDED, "no point where dense_tp_row or dense_tp_column was measured as well"
    at = {(point.N, point.B): point for point in points}
    verdicts = {place: point.verdict for place, point in at.items()}
    for status, wanted, words in (
        (HOLDS, {"faster"}, "each"),
        (FAILS, {"slower", "same"}, "none"),
    ):
        inside = corner(verdicts, wanted)
        if inside:
            n0, b0 = (min(size) for size in zip(*inside, strict=True))
            where = f"of the {len(inside)} points with N ≥ {n0} and B ≥ {b0}"
            return status, f"faster at {words} {where}: {_spread([at[place] for place in inside])}"
    if len(points) == 1:
        return UNDECIDED, f"one point shows no trend: {_spread(points)}"
    return UNDECIDED, f"no corner of large N and B agrees: {_tally(points)}; {_spread(points)}"


def shrink_status(points: list[Point]) -> tuple[str, str]:
    """H2: the advantage shrinks at every point that tests the claim, or at none of them."""
    if not points:
        return UNDECIDED, "no point where the forward and dense training were measured as well"
    tally, shares = _tally(points), [p.upkeep for p in points if p.upkeep is not None]
    parts = [tally]
    if shares:
        parts.append(f"upkeep {100 * min(shares):.1f}% to {100 * max(shares):.1f}% of a step")
    tests = [point for point in points if point.verdict in ("shrinks", "kept")]
    behind = [point for point in points if point.verdict in ("falls behind", "none to lose")]
    shown = max(tests or behind or points, key=lambda p: (p.N, p.B, p.upkeep or 0))
    which = f" ({shown.of})" if len({point.of for point in points}) > 1 else ""
    parts.append(
        f"at N={shown.N}, B={shown.B}{which} the time against dense goes from {shown.forward} in "
        f"the forward to {shown.ratio} in training"
    )
    statuses = {point.verdict for point in tests}
    unsure = sum(point.verdict == "unsure" for point in points)
    if len(statuses) == 1 and len(tests) > unsure:
        return (HOLDS if statuses == {"shrinks"} else FAILS), "; ".join(parts)
    if len(statuses) > 1:
        why = "it depends on the point"
    elif unsure > len(points) / 2:
        why = "most points are unsure"
    elif behind:
        why = "there is no forward advantage that could shrink"
    else:
        why = "upkeep is small wherever there is something to lose, so nothing tests it"
    return UNDECIDED, "; ".join([why, *parts])


def everywhere_status(points: list[Point]) -> tuple[str, str]:
    """H3: slower at every judged point, or at none; most points are judged."""
    if not points:
        return (
            UNDECIDED,
            "no point where Block-Shock was measured with the same mask and reduce as well",
        )
    slower = sum(point.verdict == "slower" for point in points)
    not_slower = sum(point.verdict in ("same", "faster") for point in points)
    text = f"{_tally(points)}; {_spread(points)}"
    if slower > len(points) / 2 and not not_slower:
        return HOLDS, text
    if not_slower > len(points) / 2 and not slower:
        return FAILS, text
    if slower and not_slower:
        where = ", ".join(f"N={p.N} B={p.B}" for p in points if p.verdict == "slower")
        return UNDECIDED, f"it depends on the size: {text}; slower at {where}"
    return UNDECIDED, f"most points are unsure: {text}"


def _tally(points: list[Point]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for point in points:
        counts[point.verdict] += 1
    words = ", ".join(f"{number} {_said(name, number)}" for name, number in counts.items())
    return f"of {len(points)} point{'s' * (len(points) > 1)} {words}"


def _said(verdict: str, number: int) -> str:
    """A verdict as the predicate of so many points: 1 falls behind, 26 fall behind."""
    word, space, rest = verdict.partition(" (")
    one, many = PREDICATES.get(word, (word, word))
    return (one if number == 1 else many) + space + rest


def _spread(points: list[Point]) -> str:
    largest = max(points, key=lambda point: (point.N, point.B))
    at = f"{largest.ratio} at N={largest.N}, B={largest.B}"
    at += f" against {largest.against}" if largest.against else ""
    if len(points) == 1:
        return f"time ratio {at}"
    values = [point.ratio.value for point in points]
    return f"time ratio {min(values):.3f} to {max(values):.3f}, {at}"
