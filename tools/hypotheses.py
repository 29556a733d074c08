"""The three hypotheses, and what measured points say about each.

H1  For large enough N and B, block_shock's forward beats two-rank dense tensor parallelism: the
    better of dense_tp_row and dense_tp_column. It holds where a corner of the measured grid (all
    points with N >= N0 and B >= B0, the largest N and the largest B among them, two points at
    least) is faster at every point; it fails where such a corner is faster at none, and every
    point of it is judged. No finite set of points says more about "large enough". A win over one
    of the two dense methods, where the other was not measured, is no win.

H2  In training its advantage shrinks, unless upkeep is small against the product. Advantage is
    dense time over Block-Shock time; upkeep is the share of a step spent in `compress`. Only
    points where upkeep is not small, and where the forward has an advantage, test the claim: one
    supports it where the advantage in training is below that of the forward at the same sizes, and
    contradicts it where training keeps it. Without a forward advantage nothing can shrink: such a
    point is reported ("falls behind", "none to lose") and decides nothing. All policies and
    optimizers are judged together, since "unless" is about what differs between them.

H3  Masked split dense is slower than Block-Shock, in the forward, at the same mask.

A point is judged as in tools.compare: a threshold and an interval that excludes 1. Whatever is left
over is undecided. `block_shock` on two ranks decides; other methods, as block_shock_folded, whose
arithmetic is dense, and other numbers of ranks are reported beside it.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from tools.cases import Result, Results, interleaved, order, setting, setting_text
from tools.rules import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Point,
    corner_status,
    everywhere_status,
    shrink_status,
    training_verdict,
)
from tools.stats import THRESHOLD, Interval, combine, judge

DENSE = ("dense_tp_row", "dense_tp_column")
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
    """H1, H2 and H3 on these results."""
    return [
        _verdict("H1", beats_dense(results, threshold)),
        _verdict("H2", advantage_shrinks(results, threshold, small_upkeep)),
        _verdict("H3", masked_is_slower(results, threshold)),
    ]


def beats_dense(results: Results, threshold: float) -> list[Finding]:
    """H1, one finding for each Block-Shock method and setting."""
    forward = results.of("forward")
    findings = []
    for group in _groups(forward, SHOCKS):
        points = []
        for result in group:
            dense = _dense(forward, result)
            if not dense:
                continue
            ratio = _against_better([result], dense)
            verdict, note = judge(ratio, threshold), ""
            if len(dense) < len(DENSE):
                note = f"only {dense[0].case.method} was measured"
                verdict = "unsure" if verdict == "faster" else verdict
            better = min(dense, key=lambda one: one.median).case.method
            points.append(Point(result.case.N, result.case.B, ratio, verdict, note, better))
        status, text = corner_status(points)
        findings.append(_finding(group[0], "the better dense TP", status, text, points))
    return findings


def advantage_shrinks(results: Results, threshold: float, small: float) -> list[Finding]:
    """H2, one finding for each Block-Shock method, policy, optimizer and setting."""
    forward, training = results.of("forward"), results.of("training")
    findings = []
    for group in _groups(training, SHOCKS):
        points = []
        for result in group:
            point = _training_point(result, forward, training, threshold, small)
            if point is not None:
                points.append(point)
        if points or group[0].case.policy != "frozen":
            status, text = shrink_status(points)
            finding = _finding(group[0], "the better dense TP, in training", status, text, points)
            findings.append(finding)
    return findings


def masked_is_slower(results: Results, threshold: float) -> list[Finding]:
    """H3, one finding for each Block-Shock method and setting; the backward phase stands beside."""
    findings = []
    for phase in ("forward", "backward"):
        found = results.of(phase)
        for group in _groups(found, ["masked_split"]):
            points = []
            for result in group:
                for shock in found:
                    same = _place(shock) == _place(result) and shock.case.mask == result.case.mask
                    if shock.case.method == MAIN and same:
                        ratio = _against_better([result], [shock])
                        verdict = judge(ratio, threshold)
                        points.append(Point(result.case.N, result.case.B, ratio, verdict))
            status, text = everywhere_status(points)
            finding = _finding(
                group[0], MAIN, status, text, points, main=phase == "forward", phase=phase
            )
            if points or phase == "forward":
                findings.append(finding)
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


def _place(result: Result) -> tuple:
    return (result.case.N, result.case.B, setting(result.case))


def _dense(results: Iterable[Result], result: Result) -> list[Result]:
    """The dense tensor-parallel results at the same place; in training those that train as much."""
    policies = ("frozen",) if result.case.policy == "frozen" else (None, "plain")
    return [
        dense
        for dense in results
        if dense.case.method in DENSE
        and _place(dense) == _place(result)
        and (dense.case.phase != "training" or dense.case.policy in policies)
    ]


def _against_better(one: list[Result], others: list[Result]) -> Interval:
    """Time of `one` over the shortest of `others`; each draw finds the shortest anew."""
    both = one + others
    paired = [range(len(both))] if interleaved(both) else ()
    return combine(_over_shortest, [r.samples for r in both], paired=paired)


def _over_shortest(first, *others):
    return first / np.minimum.reduce(others)


def _training_point(
    result: Result, forward: Iterable[Result], training: Iterable[Result], threshold, small
) -> Point | None:
    case = result.case
    dense = _dense(training, result)
    forward = [r for r in forward if _forward_place(r) == _forward_place(result)]
    ahead = [r for r in forward if (r.case.method, r.case.mask) == (case.method, case.mask)]
    dense_ahead = [r for r in forward if r.case.method in {d.case.method for d in dense}]
    if not dense or not ahead or len(dense_ahead) != len(dense):
        return None
    step, pass_ = [result, *dense], [ahead[0], *dense_ahead]
    cut = len(step)
    paired = [range(cut)] if interleaved(step) else []
    paired += [range(cut, 2 * cut)] if interleaved(pass_) else []
    change = combine(
        lambda *m: _over_shortest(*m[:cut]) / _over_shortest(*m[cut:]),
        [r.samples for r in step + pass_],
        paired=paired,
    )
    ratio, before = _against_better([result], dense), _against_better([ahead[0]], dense_ahead)
    upkeep = _upkeep(result)
    verdict = training_verdict(judge(change, threshold), judge(before, threshold), upkeep, small)
    return Point(
        case.N,
        case.B,
        ratio,
        verdict,
        "",
        min(dense, key=lambda one: one.median).case.method,
        before,
        change,
        upkeep,
        None if upkeep is None else ratio.value * (1 - upkeep),
    )


def _forward_place(result: Result) -> tuple:
    # The forward has no loss and no optimizer.
    case = replace(result.case, loss=None, optimizer=None)
    return (case.N, case.B, setting(case))


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
    return Finding(result.label, words, against, status, text, tuple(points), decides)


def _verdict(name: str, findings: list[Finding]) -> Verdict:
    main = [finding for finding in findings if finding.main]
    statuses = {finding.status for finding in main}
    status = statuses.pop() if len(statuses) == 1 else UNDECIDED
    if not main:
        headline = _nothing(name)
    elif name == "H2":
        status, headline = shrink_status([p for finding in main for p in finding.points])
    elif len(main) <= 2:
        several = len(main) > 1
        headline = "; ".join(f"{f.setting}: {f.text}" if several else f.text for f in main)
    else:
        names = {
            status: ", ".join(f"{f.method} ({f.setting})" for f in main if f.status == status)
            for status in (HOLDS, FAILS, UNDECIDED)
        }
        headline = "; ".join(f"{status} for {text}" for status, text in names.items() if text)
    return Verdict(name, status, headline, tuple(findings), CLAIMS[name])


def _nothing(name: str) -> str:
    needed = {
        "H1": f"the forward of {MAIN} on two ranks",
        "H2": f"training of {MAIN} on two ranks, in a policy that trains",
        "H3": "the forward of masked_split on two ranks",
    }
    return f"not measured: it needs {needed[name]}"
