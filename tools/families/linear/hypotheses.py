"""The three hypotheses, and what measured points say about each.

H1  For large enough N and B, block_shock's forward beats two-rank dense tensor parallelism: the
    better of dense_tp_row and dense_tp_column, as users run them today (their usual reduce). The
    lines that decide have the usual kernel and the usual reduce, and any mask. It holds where a
    corner of the measured grid (all points with N >= N0 and B >= B0, the largest N and the largest
    B among them, two points at least) is faster at every point; it fails where such a corner is
    faster at none, and every point of it is judged. No finite set of points says more about "large
    enough". A win over one of the two dense methods, where the other was not measured, is no win.

H2  In training its advantage shrinks, unless upkeep is small against the product. Advantage is
    dense time over Block-Shock time; upkeep is the share of a step spent in `compress`. Only
    points where upkeep is not small, and where the forward has an advantage, test the claim: one
    supports it where the advantage in training is below that of the forward at the same sizes, and
    contradicts it where training keeps it. Without a forward advantage nothing can shrink: such a
    point is reported ("falls behind", "none to lose") and decides nothing. All policies,
    optimizers and masks are judged together, since "unless" is about what differs between them.

H3  Masked split dense is slower than Block-Shock, in the forward, at the same mask and with the
    same reduce.

A point is judged as in tools.compare: a threshold and an interval that excludes 1. Whatever is left
over is undecided. `block_shock` on two ranks with its usual kernel and reduce decides. Beside it
are reported: other kernels and reduces; other methods, as block_shock_folded, whose arithmetic is
dense; other numbers of ranks; and, for H1 and H2, the better dense TP with the same reduce as the
Block-Shock line. A dense method that was not measured with that reduce, or that has none, stands
there as it usually is.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tools.cases import Result, Results, interleaved, order, over
from tools.families.linear.naming import setting, setting_text
from tools.families.linear.opponents import (
    BETTER,
    DENSE,
    better,
    forward_place,
    opponents,
    place,
    same_terms,
    way,
)
from tools.families.linear.rules import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Point,
    corner_status,
    everywhere_status,
    shrink_status,
    training_verdict,
)
from tools.stats import THRESHOLD, combine, judge

MAIN = "block_shock"
SHOCKS = (MAIN, "block_shock_folded")
SMALL_UPKEEP = 0.05

CLAIMS = {
    "H1": "Block-Shock's forward beats two-GPU dense tensor parallelism for large enough N and B.",
    "H2": "In training its advantage shrinks, unless upkeep is small against the product.",
    "H3": "Masked split dense is slower than Block-Shock.",
}


@dataclass(frozen=True)
class Finding:
    """What the points of one method in one setting say. `main` ones decide the hypothesis."""

    method: str
    setting: str
    against: str
    status: str
    text: str
    points: tuple[Point, ...] = ()
    main: bool = True
    mask: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A hypothesis with its status; `headline` is one sentence."""

    name: str
    status: str
    headline: str
    findings: tuple[Finding, ...] = ()
    claim: str = field(default="")


def judge_all(
    results: Results, *, threshold: float = THRESHOLD, small_upkeep: float = SMALL_UPKEEP
) -> list[Verdict]:
    """H1, H2 and H3 on these results; none where no linear layer was measured."""
    results = results.only("linear")
    if not results.results:
        return []
    return [
        _verdict("H1", beats_dense(results, threshold)),
        _verdict("H2", advantage_shrinks(results, threshold, small_upkeep)),
        _verdict("H3", masked_is_slower(results, threshold)),
    ]


def beats_dense(results: Results, threshold: float) -> list[Finding]:
    """H1, one finding for each Block-Shock line and setting; one more at the same reduce."""
    forward = results.of("forward")
    findings = []
    for group in _groups(forward, SHOCKS):
        for against, dense_of in opponents(group, forward):
            points = [
                _forward_point(result, dense, threshold)
                for result in group
                if (dense := dense_of(forward, result))
            ]
            status, text = corner_status(points)
            main = against == BETTER and group[0].as_usual
            findings.append(_finding(group[0], against, status, text, points, main=main))
    return findings


def advantage_shrinks(results: Results, threshold: float, small: float) -> list[Finding]:
    """H2, one finding for each Block-Shock line, policy, optimizer and setting."""
    forward, training = results.of("forward"), results.of("training")
    findings = []
    for group in _groups(training, SHOCKS):
        for against, dense_of in opponents(group, training):
            points = []
            for result in group:
                dense = dense_of(training, result)
                point = _training_point(result, dense, forward, threshold, small)
                if point is not None:
                    points.append(point)
            if points or (group[0].case.policy != "frozen" and against == BETTER):
                status, text = shrink_status(points)
                main = against == BETTER and group[0].as_usual
                words = f"{against}, in training"
                findings.append(_finding(group[0], words, status, text, points, main=main))
    return findings


def masked_is_slower(results: Results, threshold: float) -> list[Finding]:
    """H3, one finding for each masked_split line, Block-Shock line and setting; the backward phase
    stands beside.
    """
    findings = []
    for phase in ("forward", "backward"):
        found = results.of(phase)
        shocks = _groups(found, [MAIN])
        for group in _groups(found, ["masked_split"]):
            met = []
            for line in shocks:
                at = {place(shock): shock for shock in line if same_terms(shock, group[0])}
                points = [
                    _masked_point(r, at[place(r)], threshold) for r in group if place(r) in at
                ]
                if points:
                    main = phase == "forward" and line[0].as_usual
                    met.append((line[0].label, points, main))
            if not met and phase == "forward" and not group[0].unusual:
                met.append((MAIN, [], True))
            for against, points, main in met:
                status, text = everywhere_status(points)
                findings.append(
                    _finding(group[0], against, status, text, points, main=main, phase=phase)
                )
    return findings


def _groups(results: Iterable[Result], methods: Iterable[str]) -> list[list[Result]]:
    """The results of `methods`, those of one line (label and setting) together, sorted by size."""
    groups = defaultdict(list)
    for result in results:
        if result.case.method in methods:
            groups[(result.label, setting(result.case))].append(result)
    return sorted(
        (sorted(group, key=order) for group in groups.values()), key=lambda g: order(g[0])
    )


def _forward_point(result: Result, dense: list[Result], threshold: float) -> Point:
    nearest = better(dense)
    ratio = over(result, nearest)
    verdict, note = judge(ratio, threshold), ""
    methods = {one.case.method for one in dense}
    if len(methods) < len(DENSE):
        note = f"only {dense[0].case.method} was measured"
        verdict = "unsure" if verdict == "faster" else verdict
    return Point(
        result.case.N, result.case.B, ratio, verdict, note, nearest.label, of=_words(result)
    )


def _masked_point(result: Result, shock: Result, threshold: float) -> Point:
    ratio = over(result, shock)
    return Point(result.case.N, result.case.B, ratio, judge(ratio, threshold), of=_words(result))


def _training_point(
    result: Result, dense: list[Result], forward: Iterable[Result], threshold, small
) -> Point | None:
    case = result.case
    ways = {way(one) for one in dense}
    forward = [r for r in forward if forward_place(r) == forward_place(result)]
    ahead = [r for r in forward if way(r) == way(result)]
    dense_ahead = [r for r in forward if way(r) in ways]
    if not dense or not ahead or len(dense_ahead) != len(dense):
        return None
    step, pass_ = [result, better(dense)], [ahead[0], better(dense_ahead)]
    paired = [(0, 1)] if interleaved(step) else []
    paired += [(2, 3)] if interleaved(pass_) else []
    change = combine(
        lambda a, b, c, d: a / b / (c / d), [r.samples for r in step + pass_], paired=paired
    )
    ratio, before = over(*step), over(*pass_)
    upkeep = _upkeep(result)
    verdict = training_verdict(judge(change, threshold), judge(before, threshold), upkeep, small)
    return Point(
        case.N,
        case.B,
        ratio,
        verdict,
        "",
        step[1].label,
        before,
        change,
        upkeep,
        None if upkeep is None else ratio.value * (1 - upkeep),
        _words(result),
    )


def _words(result: Result) -> str:
    """Which line and setting a point is of."""
    return ", ".join(part for part in (result.label, setting_text(result.case)) if part)


def _upkeep(result: Result) -> float | None:
    """The share of `compress` in a step of the instrumented pass; None where none was made."""
    total = result.regions.get("total")
    if total is None or total.avg <= 0:
        return None
    compress = result.regions.get("compress")
    return compress.avg / total.avg if compress else 0.0


def _finding(
    result: Result,
    against: str,
    status: str,
    text: str,
    points: list[Point],
    *,
    main: bool = True,
    phase: str = "",
) -> Finding:
    case = result.case
    decides = main and case.method in (MAIN, "masked_split") and case.ranks in (None, 2)
    decides = decides and case.policy != "frozen"
    words = setting_text(case) + (f", {phase}" if phase else "")
    return Finding(result.label, words, against, status, text, tuple(points), decides, case.mask)


def _verdict(name: str, findings: list[Finding]) -> Verdict:
    main = [finding for finding in findings if finding.main]
    statuses = {finding.status for finding in main}
    status = statuses.pop() if len(statuses) == 1 else UNDECIDED
    if not main:
        headline = _nothing(name)
    elif name == "H2":
        status, headline = shrink_status([p for finding in main for p in finding.points])
    elif len(main) <= 2:
        names = _names(main)
        headline = "; ".join(
            f"{name}: {f.text}" if name else f.text for name, f in zip(names, main, strict=True)
        )
    else:
        names = list(zip(_names(main), main, strict=True))
        parts = {
            status: ", ".join(name for name, f in names if f.status == status)
            for status in (HOLDS, FAILS, UNDECIDED)
        }
        first_name, first = names[0]
        parts = [f"{status} for {text}" for status, text in parts.items() if text]
        headline = "; ".join([*parts, f"{first_name}: {first.text}"])
    return Verdict(name, status, headline, tuple(findings), CLAIMS[name])


def _names(findings: list[Finding]) -> list[str]:
    """What tells these findings apart: the mask, the setting, both, or nothing where it is one."""
    masks = len({finding.mask for finding in findings}) > 1
    settings = len({finding.setting for finding in findings}) > 1
    return [
        ", ".join([f"mask {finding.mask}"] * masks + [finding.setting] * settings)
        for finding in findings
    ]


def _nothing(name: str) -> str:
    needed = {
        "H1": f"the forward of {MAIN} on two ranks",
        "H2": f"training of {MAIN} on two ranks, in a policy that trains",
        "H3": "the forward of masked_split on two ranks",
    }
    return f"not measured: it needs {needed[name]}"
