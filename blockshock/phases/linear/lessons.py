"""What the results of a point teach "auto": that another way was clearly faster there.

A choice was measured in a second. The laboratory measures longer, and side by side: where a case
that asks for a kernel and a sum by name beats the one that let the layer choose, and does what the
layer could have chosen, the layer chooses that from now on.
"""

from collections.abc import Callable
from statistics import median

from blockshock import tuning
from blockshock.phases.linear.case import LinearCase

ASKED = ("kernel", "reduce")
SIDE = "forward"  # the one phase with one choice in its time
TIMED = {"mode": "graph", "l2": "warm"}  # as a race is: what is best otherwise is another question


def learn(done: list[tuple[LinearCase, list[float], dict]], run: Callable) -> None:
    """Has every rank take what was clearly faster. run(function, *args): in all ranks."""
    if found := lessons(done):
        run(take, found)


def take(found: list[tuple[str, str, float]]) -> None:
    """In a rank: what `lessons` found."""
    for lesson in found:
        tuning.learn(*lesson)


def lessons(done: list[tuple[LinearCase, list[float], dict]]) -> list[tuple[str, str, float]]:
    """Of (case, samples, extra_info) measured in turn: arguments for `tuning.learn`, if any."""
    forward = [
        one
        for one in done
        if one[0].phase == SIDE
        and SIDE in one[2].get("ways", {})
        and TIMED.items() <= one[2].get("timing", {}).items()
    ]
    learned = []
    for case, samples, info in forward:
        chosen = info["ways"][SIDE]
        faster = {
            other_info["ways"][SIDE]["way"]: median(other_samples)
            for other, other_samples, other_info in forward
            if _asks_for_more(other, case) and tuning.clearly_faster(other_samples, samples)
        }
        faster = {way: time for way, time in faster.items() if way in chosen["seconds"]}
        best = min(faster, key=faster.get, default=chosen["way"])
        if best != chosen["way"]:
            learned.append((chosen["question"], best, faster[best] / median(samples)))
    return learned


def _asks_for_more(other: LinearCase, case: LinearCase) -> bool:
    """Whether another case is the same layer, which leaves less to choose."""
    asked = [(getattr(case, name), getattr(other, name)) for name in ASKED]
    return (
        (case.method, case.mask) == (other.method, other.mask)
        and all(mine in ("auto", theirs) for mine, theirs in asked)
        and any(mine != theirs for mine, theirs in asked)
    )
