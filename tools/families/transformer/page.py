"""What fewer syncs show: figures in the order of the report, its tables, how to read them."""

from collections.abc import Sequence
from functools import partial

from tools.case_table import by_phase
from tools.cases import Result, Results
from tools.families.transformer import attended, costs, hybrid, study_figures
from tools.families.transformer.hypotheses import judge_all
from tools.families.transformer.losses import Trained, rate, recipe_words, trained
from tools.families.transformer.points import (
    NAMING,
    PHASES,
    USUAL_SUM,
    by_place,
    communication,
    model,
    of_phase,
    over_baseline,
    plan_words,
    setting,
)
from tools.families.transformer.readme_table import readme
from tools.families.transformer.scaling import SCALING
from tools.family import TIMES, Family, Written
from tools.tables import (
    Column,
    Table,
    as_markdown,
    change,
    count,
    figure,
    filled,
    interval,
    milliseconds,
    number,
    percent,
)

READING = (
    *TIMES,
    (
        "A sync",
        "is a sum over ranks of what each computed from its part of the heads and of the MLP. "
        "Standard tensor parallelism has two a block; a plan with fewer lets each rank go on from "
        "its own part for a while.",
    ),
    (
        "desync, parallel",
        "are related designs with a sync a block: each rank keeps a stream of its own, or "
        "attention and MLP have the same input.",
    ),
    (
        "The floor of decoding",
        "is what reading a rank's weights and its part of the cache once takes.",
    ),
    (
        "The hybrid block",
        "has attention that is local to the heads of a rank, sparse or dense, and an MLP that is "
        "cut over the ranks: two syncs.",
    ),
    (
        "Losses",
        "are of the same validation tokens after the same steps, for models that differ in the "
        "plan alone.",
    ),
)
EXAMPLE = "decode 124M"
PLACE = (
    Column("model", "model"),
    number("batch", "batch"),
    number("T", "T"),
    number("syncs", "syncs", "{:.0f}".format),
    Column("reduce", "sum"),
    Column("setting", "setting"),
)
COST = (
    number("over_standard", "over standard", interval),
    number("communication", "communication", percent),
    number("mfu", "MFU", percent),
    number("val_loss", "validation loss", "{:.4f}".format),
    number("speedup", "speed over dense", interval),
)
TRADE = (
    Column("plan", "plan"),
    number("loss", "validation loss", "{:.4f}".format),
    number("above", "above standard", change),
    number("tokens_per_s", "tokens/s of training", count),
    number("speed", "training runs", "{:.3f}".format),
)


def tables(results: Results) -> list[Table]:
    """Every case of each phase."""
    titles = {phase: f"{words[0].upper()}{words[1:]}" for phase, words in PHASES.items()}
    found = partial(of_phase, results)
    return by_phase(titles, found, by_place, (*PLACE, *COST), _cells, EXAMPLE)


def full(results: Results) -> list[Written]:
    """The trade of each recipe; then decoding and training steps of each model and batch."""
    made = [
        Written(
            f"Training study: {recipe_words(plans)}. Speeds are over that of standard.",
            setting(plans[0].first.case),
            _trade(plans, results),
        )
        for plans in trained(results)
    ]
    for phase in (name for name in PHASES if name != "study"):
        for here in by_place(of_phase(results, phase)).values():
            case = here[0].case
            words = f"{PHASES[phase]}: {model(case)}, batch {case.batch}, {case.T} tokens."
            made.append(Written(words[0].upper() + words[1:], here[0].setting, _times(here)))
    return made


def _trade(plans: Sequence[Trained], results: Results) -> str:
    """A row a plan: its loss, and its speed in training and in decoding."""
    speeds = study_figures.measured_speeds(results, plans)
    more = [number(title, title, "{:.3f}".format) for title, _ in speeds]
    rows = [
        {
            "plan": one.words,
            "loss": one.loss,
            "above": 1 + sum(one.above) / len(one.above) if one.above else None,
            "tokens_per_s": rate(one.runs),
            "speed": one.speed,
            **{title: speed(one) for title, speed in speeds},
        }
        for one in plans
    ]
    return as_markdown(filled((*TRADE, *more), rows), rows)


def _times(here: Sequence[Result]) -> str:
    columns = (
        Column("plan", "method"),
        Column("reduce", "sum"),
        number("median", "ms", milliseconds),
        COST[0],
        number("over_floor", "over floor", figure),
        number("tokens_per_s", "tokens/s", count),
        *COST[1:3],
        COST[4],
    )
    rows = [
        _cells(r, here)
        | {
            "plan": plan_words(r),
            "median": r.median,
            "over_floor": r.median / r.floor["seconds"] if r.floor else None,
        }
        for r in here
    ]
    return as_markdown(filled(columns, rows), rows)


def _cells(result: Result, here: Sequence[Result]) -> dict:
    case = result.case
    return {
        **result.rates,
        "model": model(case),
        "batch": case.batch,
        "T": case.T,
        "reduce": case.reduce or USUAL_SUM,
        "setting": result.setting,
        "over_standard": over_baseline(result, here),
        "communication": communication(result, here),
        "speedup": hybrid.speedup(result, here),
    }


FAMILY = Family(
    "Tensor parallelism with fewer syncs",
    "With how few sums over ranks can a model live, and what do they buy? And how fast is a block "
    "with block-sparse attention?",
    READING,
    {**study_figures.FIGURES, **costs.FIGURES, **hybrid.FIGURES, **attended.FIGURES},
    tables,
    judge=judge_all,
    readme=readme,
    full=full,
    naming=NAMING,
    scaling=SCALING,
)
