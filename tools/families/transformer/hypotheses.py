"""The hypotheses about fewer syncs, and what measured points say about each.

T1  A model can be trained with fewer syncs: its last validation loss is at most 2% above that of a
    sync after every sublayer, with the same data, seed and schedule. The verdict names the plan
    with the fewest syncs that holds. A plan holds where this is so for each seed that both were
    trained with, and fails where it is so for none. One seed cannot tell a plan from noise, so the
    verdict says how many there were, and how far the losses of one plan lie apart over seeds.

T2  Fewer syncs decode faster: a sync after every block takes at most 0.90, after every two blocks
    at most 0.85 of the time of a sync after every sublayer, with the backend's all-reduce. The
    whole 95% interval decides.

T3  is about the hybrid block, and stands in hybrid.py.

T4  The more ranks, the more a sync costs: on 8 ranks one sequence decodes in at most 0.85 and 0.70
    of that time.

Judged beside them: desync and parallel plans, plans without a limit, other sums over ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tools.cases import Result, Results
from tools.families.transformer.hybrid import block_is_faster
from tools.families.transformer.losses import WITHIN, Trained, recipe_words, trained
from tools.families.transformer.points import (
    BASELINE,
    by_place,
    label,
    model,
    of_phase,
    over_baseline,
    plan_words,
    setting,
)
from tools.judged import FAILS, HOLDS, MIXED, UNDECIDED, Judgement, Verdict, sentence
from tools.stats import Interval
from tools.tables import Column, figure, number, percent

LIMITS = {"spd": 0.90, "spd_2": 0.85}  # of the time of the baseline, in decoding
MANY, OF_MANY = 8, {"spd": 0.85, "spd_2": 0.70}  # the same of one sequence on so many ranks
LOSS_COLUMNS = (
    number("seed", "seed"),
    number("loss", "validation loss", figure),
    number("standard", "of standard", figure),
    number("above", "above it", percent),
)
TIME_COLUMNS = (
    Column("of", "plan"),
    number("ratio", "time ratio [95%]"),
    number("limit", "limit", "{:.2f}".format),
)


@dataclass(frozen=True)
class Loss:
    """The last validation losses of one seed."""

    seed: int
    loss: float
    standard: float
    above: float


@dataclass(frozen=True)
class Time:
    """The time of a plan over the baseline's at one point."""

    of: str
    ratio: Interval
    limit: float


def judge_all(results: Results, threshold: float) -> list[Verdict]:
    """T1 to T4 on these results. threshold: not used, as each claim has limits of its own."""
    return [
        loses_little(results),
        decodes_faster(results),
        block_is_faster(results),
        decodes_faster_on_many(results),
    ]


def loses_little(results: Results) -> Verdict:
    """T1."""
    judgements, told = [], []
    for plans in trained(results):
        if not plans[0].standard or len(plans) == 1:
            continue
        found = [_loss(one, plans) for one in plans if not one.is_standard]
        judgements += found
        told.append(_fewest(plans, found))
    needed = "runs of a sync after every sublayer and of another plan, with the same settings"
    words = " ".join(told) or f"Not measured: it needs {needed}."
    claim = f"Trained with fewer syncs, the validation loss stays within {WITHIN:.0%}."
    judgements.sort(key=lambda judgement: not judgement.decides)
    return Verdict("T1", claim, words, tuple(judgements), LOSS_COLUMNS)


def decodes_faster(results: Results) -> Verdict:
    """T2."""
    judgements, found = [], of_phase(results, "decode")
    several = len({setting(r.case) for r in found}) > 1
    for here in by_place(found).values():
        compared = (r for r in here if over_baseline(r, here) is not None)
        judgements += [_time(r, here, several, LIMITS) for r in compared]
    judgements.sort(key=lambda judgement: not judgement.decides)
    claim = (
        f"A sync after every block decodes in at most {LIMITS['spd']:.2f}, after every two blocks "
        f"in at most {LIMITS['spd_2']:.2f} of the time of one after every sublayer."
    )
    needed = "decoding with a sync after every sublayer and after every block"
    return Verdict("T2", claim, sentence(judgements, needed), tuple(judgements), TIME_COLUMNS)


def decodes_faster_on_many(results: Results) -> Verdict:
    """T4."""
    found = [r for r in of_phase(results, "decode") if (r.case.ranks, r.case.batch) == (MANY, 1)]
    several = len({setting(r.case) for r in found}) > 1
    judgements = tuple(
        _time(r, here, several, OF_MANY)
        for here in by_place(found).values()
        for r in here
        if r.as_usual and r.case.method in OF_MANY and over_baseline(r, here) is not None
    )
    claim = (
        f"On {MANY} ranks, one sequence decodes with a sync after every block in at most "
        f"{OF_MANY['spd']:.2f}, after every two blocks in at most {OF_MANY['spd_2']:.2f} of the "
        "time of one after every sublayer."
    )
    needed = f"decoding of batch 1 on {MANY} ranks with these plans"
    return Verdict("T4", claim, sentence(judgements, needed), judgements, TIME_COLUMNS)


def _loss(one: Trained, plans: Sequence[Trained]) -> Judgement:
    pairs = {seed: one.standard[seed] for seed in one.runs if seed in one.standard}
    points = tuple(
        Loss(
            seed,
            one.runs[seed].rates["val_loss"],
            standard.rates["val_loss"],
            one.runs[seed].rates["val_loss"] / standard.rates["val_loss"] - 1,
        )
        for seed, standard in pairs.items()
    )
    above = [point.above for point in points]
    good = sum(value <= WITHIN for value in above)
    status = UNDECIDED if not above else HOLDS if good == len(above) else MIXED if good else FAILS
    words = f"no seed was trained with both (limit {WITHIN:+.0%})"
    if len(above) == 1:
        words = f"loss {points[0].loss:.4f}, {above[0]:+.2%} (limit {WITHIN:+.0%}), one seed"
    elif above:
        words = (
            f"loss {one.loss:.4f}, {min(above):+.2%} to {max(above):+.2%} over {len(above)} seeds "
            f"(limit {WITHIN:+.0%})"
        )
    standard = next(other for other in plans if other.is_standard)
    line = f"{one.words} ({recipe_words(plans)})"
    return Judgement(line, standard.words, status, words, points, decides=one.evenly)


def _fewest(plans: Sequence[Trained], found: Sequence[Judgement]) -> str:
    """The plan with the fewest syncs that holds, with seeds and noise, in a sentence or two."""
    others = [one for one in plans if not one.is_standard]
    good = [
        one
        for one, judgement in zip(others, found, strict=True)
        if judgement.decides and judgement.status == HOLDS
    ]
    where = recipe_words(plans)
    standard = next(one for one in plans if one.is_standard)
    if not good:
        return f"No plan with fewer syncs than {standard.words} holds ({where})."
    best = min(good, key=lambda one: one.syncs)
    worst = max(best.above)
    seeds = len(best.above)
    verb = "is" if best.syncs == 1 else "are"
    told = (
        f"{best.words} {verb} the fewest within {WITHIN:.0%} of {standard.words}: {worst:+.2%} "
        f"({where}, {'one seed' if seeds == 1 else f'the worst of {seeds} seeds'})."
    )
    noise = [one.noise for one in plans if one.noise is not None]
    if not noise:
        return f"{told} One seed cannot tell noise from a difference."
    return f"{told} The losses of one plan scatter by {max(noise):.2%} over seeds."


def _time(result: Result, here: Sequence[Result], several: bool, limits: dict) -> Judgement:
    """several: whether there are several settings, and each is to be named."""
    ratio, limit = over_baseline(result, here), limits.get(result.case.method, 1.0)
    if not ratio.enough:
        status = UNDECIDED
    elif ratio.high <= limit:
        status = HOLDS
    else:
        status = FAILS if ratio.low > limit else UNDECIDED
    case = result.case
    where = f"{model(case)}, batch {case.batch}, cache {case.T}"
    where += f", {setting(case)}" if several else ""
    standard = next(r for r in here if r.case.method == BASELINE and r.as_usual)
    decides = result.as_usual and case.method in limits
    return Judgement(
        f"{label(result)} ({where})",
        plan_words(standard),
        status,
        f"{ratio} of its time (limit {limit:.2f})",
        (Time(label(result), ratio, limit),),
        decides,
    )
