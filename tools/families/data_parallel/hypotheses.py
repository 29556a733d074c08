"""The hypothesis about data parallelism on many ranks, and what measured points say about it.

P1  On 8 ranks, a training step of OURS keeps at least 0.90 of the tokens a second of as many ranks
    that exchange nothing, and is at least as fast as torch_ddp's. The whole 95% interval decides.

Judged beside it: other numbers of ranks, options that are not the usual ones.
"""

from tools.cases import Result, Results
from tools.families.data_parallel.points import (
    NONE,
    PEER,
    by_place,
    efficiency,
    model,
    of_phase,
    over_peer,
    setting,
)
from tools.judged import FAILS, HOLDS, UNDECIDED, Judgement, Verdict, sentence
from tools.stats import Interval

OURS = ("overlapped", "sharded_optimizer", "fully_sharded")
RANKS, KEPT = 8, 0.90
# Opponent -> what is compared, the limit that it has to reach, and what it is.
AGAINST = {
    NONE: (efficiency, KEPT, "of its tokens a second"),
    PEER: (over_peer, 1.0, "times as fast"),
}


def judge_all(results: Results, threshold: float) -> list[Verdict]:
    """P1. threshold: not used, as the claim has limits of its own."""
    found = [r for r in of_phase(results, "training") if r.case.method in (*OURS, *AGAINST)]
    judgements = []
    for here in by_place(found).values():
        ours = [r for r in here if r.case.method in OURS]
        for opponent, (compare, limit, words) in AGAINST.items():
            ratios = ((r, compare(r, here)) for r in ours)
            judgements += [
                _judged(r, opponent, ratio, limit, words)
                for r, ratio in ratios
                if ratio is not None
            ]
    judgements.sort(key=lambda judgement: not judgement.decides)
    claim = (
        f"On {RANKS} ranks, {', '.join(OURS)} keep at least {KEPT:.2f} of the tokens a second of "
        f"ranks that exchange nothing, and are at least as fast as {PEER}."
    )
    needed = f"training steps of these, {NONE} and {PEER} on {RANKS} ranks"
    return [Verdict("P1", claim, sentence(judgements, needed), tuple(judgements))]


def _judged(result: Result, opponent: str, ratio: Interval, limit: float, words: str) -> Judgement:
    if not ratio.enough:
        status = UNDECIDED
    elif ratio.low >= limit:
        status = HOLDS
    else:
        status = FAILS if ratio.high < limit else UNDECIDED
    case = result.case
    where = f"{model(case)}, {case.batch} × {case.T} a rank, {setting(case)}"
    decides = case.ranks == RANKS and result.as_usual
    told = f"{ratio} {words} (limit {limit:.2f})"
    return Judgement(f"{result.label} ({where})", opponent, status, told, decides=decides)
