"""The README's table: of each plan its loss, and its time over that of a sync after every sublayer.

The model is that of the study with the most tokens, or without one that of most decoded plans.
"""

from collections.abc import Sequence

from tools.cases import Result, Results
from tools.families.transformer.losses import Trained, recipe_words, trained
from tools.families.transformer.points import (
    USUAL_SUM,
    baseline,
    by_place,
    evenly,
    model,
    of_phase,
    over_baseline,
    plan_words,
)
from tools.family import README_ROWS, Written
from tools.tables import Column, as_markdown, change, filled, milliseconds, number

SHOWN = ("collective", "exchange")  # sums over ranks, where they were measured
LOSS = (
    Column("plan", "plan"),
    number("loss", "validation loss", "{:.4f}".format),
    number("above", "above standard", change),
)
POINTS = 2  # at most so many of each phase: batches


def readme(results: Results) -> Written | None:
    """The table with its words, or None where no plan can be compared with standard."""
    studies = [plans for plans in trained(results) if plans[0].standard]
    plans = [one for one in studies[0] if one.evenly] if studies else []
    points = {phase: _points(results, phase, plans) for phase in ("sync", "decode")}
    shown = [here for group in points.values() for here in group]
    if not plans and not shown:
        return None
    rows: dict[str, dict] = {}
    for one in plans:
        rows[one.first.case.method] = {
            "plan": one.words,
            "syncs": one.syncs,
            "loss": one.loss,
            "above": 1 + sum(one.above) / len(one.above) if one.above else None,
        }
    columns = list(LOSS)
    for phase, group in points.items():
        for here in group:
            for sum_ in (name for name in SHOWN if name in {r.case.reduce for r in here}):
                key, title = f"{id(here)} {sum_}", _title(phase, here, sum_)
                columns.append(number(key, title, "{:.3f}".format))
                for result in here:
                    if evenly(result) and result.case.reduce == sum_:
                        row = rows.setdefault(result.case.method, {})
                        row |= {"plan": plan_words(result), "syncs": result.rates["syncs"]}
                        row[key] = _time(result, here)
    ordered = sorted(rows.values(), key=lambda row: -row["syncs"])[:README_ROWS]
    table = as_markdown(filled(columns, ordered), ordered)
    return Written(_words(plans, shown), _setting(plans, shown), table)


def _points(results: Results, phase: str, plans: Sequence[Trained]) -> list[list[Result]]:
    """The points of a phase that have a baseline, of one model: that of the plans, if any."""
    found = [h for h in by_place(of_phase(results, phase)).values() if len(h) > 1 and baseline(h)]
    if plans:
        sizes = _sizes(plans[0].first)
    else:
        sizes = _sizes(max(found, key=len)[0]) if found else None
    return [here for here in found if _sizes(here[0]) == sizes][:POINTS]


def _sizes(result: Result) -> tuple:
    return result.case.width, result.case.depth


def _time(result: Result, here: Sequence[Result]) -> float:
    ratio = over_baseline(result, here)
    return ratio.value if ratio else 1.0


def _title(phase: str, here: Sequence[Result], sum_: str) -> str:
    """decoding, batch 16, exchange."""
    words = {"sync": "training step", "decode": "decoding"}[phase]
    several = len({r.case.reduce for r in here}) > 1
    return ", ".join([words, f"batch {here[0].case.batch}", *([sum_] if several else [])])


def _words(plans: Sequence[Trained], shown: Sequence[list[Result]]) -> str:
    told = [f"Trained for {recipe_words(plans).partition(', ')[2]}."] if plans else []
    if shown:
        case = shown[0][0].case
        first = (baseline(here) for here in shown)
        times = ", ".join(f"{milliseconds(r.median)} ms" for r in first if r)
        told.append(
            f"{model(case)}, {case.T} tokens in a sequence or cache. Times are over that of a sync "
            f"after every sublayer, summed by the backend ({USUAL_SUM}): {times}."
        )
    return " ".join(told)


def _setting(plans: Sequence[Trained], shown: Sequence[list[Result]]) -> str:
    return shown[-1][0].setting if shown else plans[0].first.setting
