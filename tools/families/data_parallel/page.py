"""What data parallelism shows: figures in the order of the report, its tables, how to read them."""

from collections.abc import Sequence
from functools import partial

from tools.case_table import by_phase
from tools.cases import Result, Results
from tools.families.data_parallel.figures import FIGURES
from tools.families.data_parallel.hypotheses import judge_all
from tools.families.data_parallel.points import (
    NAMING,
    PEER,
    PHASES,
    by_place,
    efficiency,
    epoch_hours,
    model,
    of_phase,
    over_peer,
)
from tools.families.data_parallel.scaling import SCALING
from tools.family import README_ROWS, TIMES, Family, Written
from tools.tables import (
    Column,
    Table,
    as_markdown,
    count,
    figure,
    filled,
    interval,
    milliseconds,
    number,
    percent,
    size,
)

READING = (
    *TIMES,
    (
        "MFU",
        "is the FLOPs of the model (6 for each multiplied parameter and 12 · depth · width · T for "
        "attention in full, a token) over what the ranks could do in that time: at the matrix rate "
        "measured here, or at the data sheet's.",
    ),
    (
        "none",
        "exchanges nothing: as many ranks, each alone with as many tokens, in the same rounds. "
        "Scaling efficiency and the share of communication are against it.",
    ),
    (
        "Losses",
        "are those after the same number of steps from the same first weights, mean over ranks. "
        "Tokens are bytes of text, so they compare with each other and with nothing else.",
    ),
)
EXAMPLE = "training 124M"
PLACE = (
    Column("model", "model"),
    number("batch", "sequences a rank"),
    number("T", "T"),
    Column("attention", "attention"),
    Column("setting", "setting"),
)
COST = (
    number("mfu", "MFU of matrix rate", percent),
    number("mfu_datasheet", "MFU of data sheet", percent),
    number("efficiency", "scaling efficiency", interval),
    number("over_peer", f"speed over {PEER}", interval),
    number("optimizer_bytes", "optimizer", size),
    number("loss", "loss", figure),
    number("epoch", "hours an epoch", figure),
)
LEFT_OUT = "flat"  # of the README where all are too many: one bucket, as bucketed has several


def tables(results: Results) -> list[Table]:
    """Every case of each phase."""
    titles = {phase: f"Data parallel, {PHASES.get(phase, phase)}" for phase in NAMING.phases}
    found = partial(of_phase, results)
    return by_phase(titles, found, by_place, (*PLACE, *COST), _cells, EXAMPLE)


def readme(results: Results) -> Written | None:
    """The README's table: every method at the largest model, a training step; None without."""
    points = list(by_place([r for r in of_phase(results, "training") if r.as_usual]).values())
    here = next((p for p in reversed(points) if len(p) > 1), None)
    if here is None:
        return None
    case = here[0].case
    words = (
        f"A training step of a decoder of {model(case)}, {case.batch} sequences of {case.T} tokens "
        f"a rank. Scaling is against none, and speed against {PEER}."
    )
    rows = here if len(here) <= README_ROWS else [r for r in here if r.case.method != LEFT_OUT]
    return Written(words, here[0].setting, _markdown(rows[:README_ROWS], ()))


def full(results: Results) -> list[Written]:
    """A table of each phase and setting; other sizes of buckets are in the report."""
    made = []
    for phase, words in PHASES.items():
        found = of_phase(results, phase)
        for setting in dict.fromkeys(r.setting for r in found):
            group = [r for r in found if r.setting == setting and "bucket_mib" not in r.unusual]
            made.append(Written(f"Data parallel, {words}.", setting, _markdown(group, PLACE[:4])))
    return made


def _markdown(found: Sequence[Result], where: Sequence[Column]) -> str:
    near = {r.id: here for here in by_place(found).values() for r in here}
    columns = (
        *where,
        Column("method", "method"),
        number("median", "ms", milliseconds),
        number("tokens_per_s", "tokens/s", count),
        COST[1],
        number("peak_bytes", "peak memory", size),
        *COST[2:5],
    )
    rows = [
        _cells(r, near[r.id]) | r.memory | {"method": r.label, "median": r.median} for r in found
    ]
    return as_markdown(filled(columns, rows), rows)


def _cells(result: Result, here: Sequence[Result]) -> dict:
    case = result.case
    return {
        **result.rates,
        "model": model(case),
        "batch": case.batch,
        "T": case.T,
        "attention": case.attention or result.paths.get("attention"),
        "setting": result.setting,
        "efficiency": efficiency(result, here),
        "over_peer": over_peer(result, here),
        "epoch": epoch_hours(result),
    }


FAMILY = Family(
    "Data parallelism",
    "What does it cost to train one model on several ranks, which way to exchange gradients hides "
    "most of it, and how fast does a language model train with it?",
    READING,
    FIGURES,
    tables,
    judge=judge_all,
    readme=readme,
    full=full,
    naming=NAMING,
    scaling=SCALING,
)
