"""The three hypotheses, and what measured points say about each, for each mask and opponent.

H1  For large enough N and B, block_shock's forward beats two-rank dense tensor parallelism. Its
    opponents are in opponents.py. A win over one of the two dense methods, where the other was not
    measured, is no win: such a point is unsure.

H2  In training its advantage shrinks, unless upkeep is small against the product. Advantage is
    dense time over Block-Shock time; upkeep is the share of a step spent in `compress`. Only
    points where upkeep is not small, and where the forward has an advantage, test the claim: one
    supports it where the advantage in training is below that of the forward at the same sizes, and
    contradicts it where training keeps it. All policies and optimizers of a mask are judged
    together, since "unless" is about what differs between them.

H3  Masked split dense is slower than Block-Shock, in the forward, at the same mask and with the
    same sum.

`block_shock` on two ranks with its usual kernel and reduce decides. Judged beside it: other kernels
and reduces; block_shock_folded, whose arithmetic is dense; other numbers of ranks; weights that do
not train; for H3 the backward.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

from tools.cases import Result, Results, fastest, grouped, interleaved, order, over
from tools.families.linear.naming import setting
from tools.families.linear.opponents import (
    DENSE,
    SAME_SUM,
    as_usual,
    dense_by_place,
    forward_place,
    place,
    same_sum,
    usual_name,
    way,
)
from tools.families.linear.rules import (
    Point,
    everywhere,
    large_enough,
    shrinking,
    training_verdict,
)
from tools.judged import Judgement, Verdict, sentence
from tools.stats import THRESHOLD, combine, judge
from tools.tables import Column, number, percent

MAIN = "block_shock"
SHOCKS = (MAIN, "block_shock_folded")
SMALL_UPKEEP = 0.05
COLUMNS = (
    Column("of", "line"),
    number("N", "N"),
    number("B", "B"),
    number("ratio", "time ratio [95%]"),
    number("forward", "in the forward [95%]"),
    number("change", "change [95%]"),
    number("upkeep", "upkeep", percent),
    number("without_upkeep", "without upkeep", lambda value: f"{value:.3f}"),
    Column("verdict", "verdict"),
    Column("against", "against"),
    Column("note", "note"),
)


def judge_all(results: Results, threshold: float = THRESHOLD) -> list[Verdict]:
    """H1, H2 and H3 on these results."""
    return [
        beats_dense(results, threshold),
        advantage_shrinks(results, threshold),
        masked_is_slower(results, threshold),
    ]


def beats_dense(results: Results, threshold: float) -> Verdict:
    """H1."""
    found = _against_dense(
        results,
        "forward",
        lambda result, dense: _forward_point(result, dense, threshold),
        lambda points: large_enough(points, "faster"),
    )
    return _verdict(
        "H1",
        "Block-Shock's forward beats two-GPU dense tensor parallelism for large enough N and B.",
        found,
        f"the forward of {MAIN} and of dense TP on two ranks",
    )


def advantage_shrinks(results: Results, threshold: float) -> Verdict:
    """H2."""
    forward = grouped(results.of("forward"), forward_place)
    found = _against_dense(
        results,
        "training",
        lambda result, dense: _training_point(result, dense, forward, threshold),
        lambda points: shrinking(points, SMALL_UPKEEP),
    )
    return _verdict(
        "H2",
        "In training its advantage shrinks, unless upkeep is small against the product.",
        found,
        f"training of {MAIN} on two ranks, in a policy that trains",
    )


def masked_is_slower(results: Results, threshold: float) -> Verdict:
    """H3."""
    found = []
    for phase in ("forward", "backward"):
        shocks = grouped((r for r in results.of(phase) if r.case.method == MAIN), _terms)
        for line, group in _lines(results.of(phase), ("masked_split",)):
            met = defaultdict(list)
            for result in group:
                for shock in shocks.get(_terms(result), []):
                    name = MAIN if shock.as_usual else shock.label
                    met[name].append(_point(result, shock, threshold))
            for opponent, points in met.items():
                status, words = everywhere(points, "slower")
                decides = (opponent, phase) == (MAIN, "forward") and _decides(group[0])
                name = line if phase == "forward" else f"{line}, {phase}"
                found.append(Judgement(name, opponent, status, words, tuple(points), decides))
    return _verdict(
        "H3",
        "Masked split dense is slower than Block-Shock.",
        found,
        f"the forward of masked_split and of {MAIN} on two ranks with the same mask and sum",
    )


def _against_dense(
    results: Results,
    phase: str,
    point: Callable[[Result, list[Result]], Point | None],
    status: Callable[[list[Point]], tuple[str, str]],
) -> list[Judgement]:
    """A judgement of each line of Block-Shock against each opponent; a pair may give no point."""
    of_phase, found = results.of(phase), []
    dense = dense_by_place(of_phase)
    for line, group in _lines(of_phase, SHOCKS):
        for opponent, pairs in _opponents(group, dense, usual_name(results)):
            points = [one for pair in pairs if (one := point(*pair))]
            judged = (*status(points), tuple(points), _decides(group[0]))
            found.append(Judgement(line, opponent, *judged))
    return found


def _lines(results: Iterable[Result], methods: tuple[str, ...]) -> list[tuple[str, list[Result]]]:
    """(name, results sorted by size) of each line: a mask in a setting where it decides, else what
    its label says. A name says the setting where there are several.
    """

    def line(result: Result) -> tuple:
        name = result.case.mask or result.label if _decides(result) else result.label
        case = result.case.but(optimizer=None)
        return (_decides(result), name, setting(case))

    found = (result for result in sorted(results, key=order) if result.case.method in methods)
    groups = grouped(found, line)
    several = len({key[2] for key in groups}) > 1
    return [
        (f"{name}, {text}" if several and text else name, group)
        for (_, name, text), group in sorted(groups.items(), key=lambda item: not item[0][0])
    ]


def _opponents(
    group: list[Result], dense: dict[tuple, list[Result]], usual: str
) -> list[tuple[str, list[tuple[Result, list[Result]]]]]:
    """(opponent, pairs of a result and the dense ones it meets): as users run them, and with the
    same sum where that is another.
    """
    there = [(result, dense[place(result)]) for result in group if place(result) in dense]
    met = {
        usual: [(result, as_usual(found)) for result, found in there if as_usual(found)],
        SAME_SUM: [(result, same_sum(found, result)) for result, found in there],
    }
    return [(name, pairs) for name, pairs in met.items() if name == usual or pairs != met[usual]]


def _point(result: Result, other: Result, threshold: float, **more) -> Point:
    ratio, case = over(result, other), result.case
    of = ", ".join(part for part in (result.label, setting(case)) if part)
    more = {"verdict": judge(ratio, threshold)} | more
    return Point(case.N, case.B, of, other.label, ratio, **more)


def _forward_point(result: Result, dense: list[Result], threshold: float) -> Point:
    point = _point(result, fastest(dense), threshold)
    if len({one.case.method for one in dense}) < len(DENSE):
        verdict = "unsure" if point.verdict == "faster" else point.verdict
        note = f"only {dense[0].case.method} was measured"
        return replace(point, verdict=verdict, note=note)
    return point


def _training_point(
    result: Result, dense: list[Result], forward: dict[tuple, list[Result]], threshold: float
) -> Point | None:
    """None where the forward of the line or of one of the dense methods was not measured."""
    ahead = {way(one): one for one in forward.get(forward_place(result), [])}
    if not {way(result), *map(way, dense)} <= set(ahead):
        return None
    step, pass_ = [result, fastest(dense)], [ahead[way(result)]]
    pass_.append(fastest(ahead[way(one)] for one in dense))
    paired = [pair for pair, of in (((0, 1), step), ((2, 3), pass_)) if interleaved(of)]
    change = combine(
        lambda a, b, c, d: a / b / (c / d), [r.samples for r in step + pass_], paired=paired
    )
    before, upkeep = over(*pass_), _upkeep(result)
    verdict = training_verdict(
        judge(change, threshold), judge(before, threshold), upkeep, SMALL_UPKEEP
    )
    point = _point(*step, threshold, verdict=verdict, forward=before, change=change, upkeep=upkeep)
    if upkeep is None:
        return point
    return replace(point, without_upkeep=point.ratio.value * (1 - upkeep))


def _upkeep(result: Result) -> float | None:
    """The share of `compress` in a step of the instrumented pass; None where none was made."""
    total, compress = result.regions.get("total"), result.regions.get("compress")
    if total is None or total.avg <= 0:
        return None
    return compress.avg / total.avg if compress else 0.0


def _decides(result: Result) -> bool:
    """Whether a hypothesis is about this result."""
    case = result.case
    usual = case.method in (MAIN, "masked_split") and result.as_usual
    return usual and case.ranks in (None, 2) and case.policy != "frozen"


def _terms(result: Result) -> tuple:
    """What two superposed layers with the same terms, summed in the same way, share."""
    return (place(result), result.case.mask, result.case.reduce)


def _verdict(name: str, claim: str, found: list[Judgement], needed: str) -> Verdict:
    found = [judgement for judgement in found if judgement.points or judgement.decides]
    found.sort(key=lambda judgement: not judgement.decides)
    return Verdict(name, claim, sentence(found, needed), tuple(found), COLUMNS)
