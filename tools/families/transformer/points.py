"""Results of sync plans: what they are called, which stand at one point, what they are compared to.

A point is a model with its batch and setting. BASELINE has a sync after every sublayer: standard
tensor parallelism, summed by the backend's all-reduce.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from statistics import linear_regression

from tools.cases import Case, Naming, Result, Results, grouped, over
from tools.stats import Interval

PHASES = {
    "sync": "training step",
    "decode": "decoding a token",
    "study": "training study",
    "hybrid_forward": "hybrid block, forward",
    "hybrid_backward": "hybrid block, forward and backward",
}
BASELINE, USUAL_SUM = "tp", "collective"
SIZES = ("width", "depth", "batch", "T")
# Syncs a block -> the rule of such a plan, where its syncs are spread evenly.
RULES = {
    Fraction(2): "tp",
    Fraction(1): "spd",
    Fraction(3, 4): "spd_mixed",
    Fraction(1, 2): "spd_2",
    Fraction(1, 3): "spd_3",
    Fraction(1, 4): "spd_4",
    Fraction(1, 6): "spd_6",
}
OTHER_RULE = "syncs_"  # begins the name of any other number of them
SUMS = {
    "collective": ("#0072b2", "o"),
    "exchange": ("#d55e00", "P"),
    "two_shot": ("#009e73", "h"),
    "auto": ("#cc79a7", "D"),
}


def setting(case: Case) -> str:
    """What the plans of one figure share beside the model and its batch, in words."""
    parts = [case.dtype or ""]
    parts += [f"{case.ranks} rank" + "s" * (case.ranks != 1)] if case.ranks else []
    if case.tensor_ranks not in (None, case.ranks):
        parts.append(f"{case.tensor_ranks} of them share a model")
    for name, words in (("compiled", "compiled"), ("checkpointed", "checkpointed")):
        parts += [words] * bool(getattr(case, name))
    parts += ["vocabulary split"] * bool(case.vocabulary_parallel)
    parts += ["not causal"] * (case.causal is False)
    known = {"vocabulary": 50304, "attention": None, "seed": 0}
    if case.phase == "study":  # seeds stand together, and a tokenizer decides the vocabulary
        known = {}
    for name, usual in known.items():
        value = getattr(case, name)
        parts += [f"{name} {value}"] if value not in (None, usual) else []
    return ", ".join(parts)


def run_label(result: Result) -> str:
    """As `case.label` of the run: spd-exchange."""
    case = result.case
    reduce = case.reduce if case.reduce != USUAL_SUM else None
    return "-".join(part for part in (case.method, case.pattern, reduce) if part)


def plan_words(result: Result) -> str:
    """The plan in words: 12 syncs; parallel, 12 syncs. Of a hybrid block its attention."""
    method, syncs = result.case.method, result.rates.get("syncs")
    if syncs is None:
        return " · ".join([method, *([result.case.pattern] if result.case.pattern else [])])
    count = f"{syncs:.0f} sync" + "s" * (syncs != 1)
    return count if evenly(result) else f"{method}, {count}"


def label(result: Result) -> str:
    """The plan in words, with a sum that is not the usual one."""
    reduce = result.unusual.get("reduce")
    return " · ".join([plan_words(result), *([reduce] if reduce else [])])


NAMING = Naming(
    methods={
        "tp": ("#0072b2", "o"),
        "spd": ("#009e73", "s"),
        "spd_mixed": ("#56b4e9", "h"),
        "spd_2": ("#e69f00", "D"),
        "spd_3": ("#d55e00", "P"),
        "spd_4": ("#cc79a7", "X"),
        "spd_6": ("#882255", "v"),
        "desync": ("#7a7f87", "<"),
        "parallel": ("#999933", "^"),
        "dense_attention": ("#0072b2", "o"),
        "sparse_attention": ("#009e73", "h"),
    },
    phases=tuple(PHASES),
    sizes=SIZES,
    line=("pattern", "reduce"),
    ways=("reduce",),  # a pattern changes what is computed
    label=label,
    run_label=run_label,
    setting=setting,
)


def rule(syncs: int, depth: int) -> str:
    """The name of the plan that spreads so many syncs evenly over so many blocks."""
    return RULES.get(Fraction(syncs, depth), f"{OTHER_RULE}{syncs}")


def evenly(result: Result) -> bool:
    """Whether its plan is one of the row from every sublayer to every few blocks."""
    method = result.case.method
    return method in RULES.values() or method.startswith(OTHER_RULE)


def place(case: Case) -> tuple:
    """Which model does what: equal for the plans of a point, and the seeds of a study."""
    sizes = tuple(getattr(case, name) for name in SIZES)
    return (*sizes, case.heads or 0, case.steps or 0, case.recipe or "", setting(case))


def without_ranks(case: Case) -> Case:
    """The same for every number of ranks: its place and setting are those of all of them."""
    return case.but(ranks=None)


def model(case: Case) -> str:
    """The model in words: its label, or width × depth."""
    return case.model or f"{case.width}×{case.depth}"


def of_phase(results: Results, phase: str) -> list[Result]:
    """The results of a phase, plans in reading order."""
    return sorted(results.of(phase), key=lambda r: (place(r.case), r.line_order, r.id))


def by_place(found: Iterable[Result]) -> dict[tuple, list[Result]]:
    """The results of each point, small models first."""
    groups = grouped(found, lambda result: place(result.case))
    return {key: groups[key] for key in sorted(groups)}


def baseline(here: Iterable[Result]) -> Result | None:
    """The one that the others of a point are compared with; None where it was not measured."""
    return next((r for r in here if r.case.method == BASELINE and r.as_usual), None)


def over_baseline(result: Result, here: Sequence[Result]) -> Interval | None:
    """Time over the baseline's, below 1 it is the faster; None without one, or of itself."""
    first = baseline(here)
    return None if first in (None, result) else over(result, first)


def communication(result: Result, here: Iterable[Result]) -> float | None:
    """The share of the sums over ranks in a step; None where it is not known.

    From an instrumented step, with waiting. A decoding step in a graph is mostly launches when it
    is instrumented: there from what each further sync costs in the plans `here`.
    """
    if result.case.phase == "decode" and result.timing.get("mode") == "graph":
        cost = seconds_a_sync([r for r in here if r.case.reduce == result.case.reduce])
        return None if cost is None else max(0.0, cost * result.rates["syncs"] / result.median)
    total, sums = result.regions.get("total"), result.regions.get("allreduce")
    if total is None or total.avg <= 0:
        return None
    return sums.avg / total.avg if sums else 0.0


def seconds_a_sync(plans: Iterable[Result]) -> float | None:
    """The slope of the least-squares line of time over syncs; None with fewer than three plans."""
    points = {r.rates["syncs"]: r.median for r in plans if "syncs" in r.rates and evenly(r)}
    return linear_regression(list(points), list(points.values())).slope if len(points) > 2 else None
