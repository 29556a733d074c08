"""The hybrid block: sparse against dense attention in a tensor-parallel block, over the length."""

from collections.abc import Callable, Sequence
from functools import partial

from tools.cases import Result, Results, grouped, over
from tools.drawing import series
from tools.drawing.chart import Absent, Axis, Drawing, Point
from tools.drawing.series import Kind, Sketch, Words
from tools.families.transformer.costs import share
from tools.families.transformer.points import PHASES, by_place, of_phase
from tools.judged import FAILS, HOLDS, UNDECIDED, Judgement, Verdict, sentence
from tools.stats import Interval
from tools.tables import milliseconds

HYBRID = {phase: words for phase, words in PHASES.items() if phase.startswith("hybrid")}
DENSE = "dense_attention"
LENGTH, WINDOW, TIMES = 32768, 1024, 3.0  # where the claim is made, and what it claims


def speedup(result: Result, here: Sequence[Result]) -> Interval | None:
    """Time with dense attention over that of a sparse one; None without it, or of dense itself."""
    sums = [r for r in here if r.case.method == DENSE and r.case.reduce == result.case.reduce]
    return over(sums[0], result) if sums and result.case.method != DENSE else None


def _speedup(result: Result, here: Sequence[Result]) -> Point | None:
    found = speedup(result, here)
    return found and Point(0, found.value, found.low, found.high)


KINDS = {
    "time": Kind(
        "time against length",
        "Median time of a block on the slowest rank. Dashed: the floor at the rates measured on "
        "this machine. Both axes are logarithmic. Lower is better.",
        Axis("ms", lambda ms: f"{milliseconds(1e-3 * ms)} ms", "log"),
        lambda result, here: 1e3 * result.median,
    ),
    "speedup": Kind(
        "speed over dense attention",
        "Time of the same block with dense attention over the time with a sparse one, in the same "
        "rounds, with 95% intervals. Higher is better.",
        Axis("times as fast", "{:.2f}".format, "ratio", 1.0),
        _speedup,
    ),
    "communication": Kind(
        "share of communication",
        "Time of the sums over ranks as a share of the block, in an instrumented pass. Waiting for "
        "other ranks is in it; the rest is arithmetic and memory traffic.",
        Axis("%", "{:.1f}%".format, "even"),
        share,
    ),
}


def by_length(results: Results, phase: str, kind: str) -> list[Drawing]:
    """A value against T, a panel for each width and batch, a line for each attention."""
    one = KINDS[kind]
    words = Words(
        f"transformer_{phase}_{kind}", f"{HYBRID[phase].capitalize()}: {one.title}", one.caption
    )
    found = of_phase(results, phase)
    if not found:
        raise Absent(f"no results of the {HYBRID[phase]}")
    near = {r.id: here for here in by_place(found).values() for r in here}
    groups = {}
    for text, group in grouped(found, lambda result: result.setting).items():
        panels = grouped(group, lambda r: (r.case.width, r.case.heads, r.case.batch))
        sketches = []
        for (width, heads, batch), panel in panels.items():
            if len({r.case.T for r in panel}) > 1:
                title = f"width {width}, {heads} heads, batch {batch}"
                sketches.append(Sketch(title, "T", panel, extra=_floor(panel, kind)))
        if sketches:
            groups[text] = sketches
    if not groups:
        raise Absent(f"{HYBRID[phase]}: a line needs two lengths")
    return series.charts(
        results, groups, words, one.axis, lambda result: one.value(result, near[result.id])
    )


def _floor(panel: Sequence[Result], kind: str) -> list:
    least: dict[float, float] = {}
    for result in panel:
        if kind == "time" and result.floor:
            seconds = 1e3 * result.floor["seconds"]
            least[result.case.T] = min(seconds, least.get(result.case.T, seconds))
    return series.grey("floor", least)


def block_is_faster(results: Results) -> Verdict:
    """T3."""
    judgements = []
    for phase, words in HYBRID.items():
        for here in by_place(of_phase(results, phase)).values():
            found = ((r, speedup(r, here)) for r in here)
            judgements += [_judged(r, ratio, words) for r, ratio in found if ratio is not None]
    judgements.sort(key=lambda judgement: not judgement.decides)
    claim = (
        f"At T = {LENGTH} with a window of {WINDOW}, the hybrid block is at least {TIMES:g} times "
        "as fast as with dense attention."
    )
    needed = f"the block with both attentions at T = {LENGTH}"
    return Verdict("T3", claim, sentence(judgements, needed), tuple(judgements))


def _judged(result: Result, ratio: Interval, words: str) -> Judgement:
    case = result.case
    decides = case.T == LENGTH and f"({WINDOW})" in (case.pattern or "") and result.as_usual
    limit = TIMES if decides else 1.0
    if not ratio.enough:
        status = UNDECIDED
    elif ratio.low >= limit:
        status = HOLDS
    else:
        status = FAILS if ratio.high < limit else UNDECIDED
    where = f"{words}, width {case.width}, T = {case.T}, {result.setting}"
    told = f"{ratio} times as fast (limit {limit:g})"
    return Judgement(f"{result.label} ({where})", DENSE, status, told, decides=decides)


FIGURES: dict[str, Callable[[Results], list[Drawing]]] = {
    f"transformer_{phase}_{kind}": partial(by_length, phase=phase, kind=kind)
    for phase in HYBRID
    for kind in KINDS
}
