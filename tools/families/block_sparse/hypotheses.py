"""The targets of block-sparse layers, and what measured points say about each.

B1  Our product is at least 1.5 times as fast as PyTorch's BSR: every layer, blocks 32 and 64.
B2  At 8192 × 8192 and 4096 rows it is faster than dense by what `SQUARES` says.
B3  In the MLPs of ViT-B and ViT-H, block 64, s = 0.9, it is 1.5 and 2.5 times as fast as dense.
B4  Forward and backward at 8192 × 8192, block 64, s = 0.9, are 2.5 times as fast as dense.
B5  The lists of a new mask of 32 × 32 tiles take at most 0.1 of the time of the product.
B6  ViT-H with pruned MLPs, block 64, s = 0.9, is 1.3 times as fast as dense as a whole.
B7  A training step of ViT-B, 256 images, takes at most 1.15 times as long under supermasks.
B8  Accuracy on digits is within 1.0 point of dense at s = 0.8, within 2.0 at 0.9.

The whole 95% interval decides. Judged beside them: every other point, against 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tools.cases import Case, Result, Results
from tools.families.block_sparse.accuracy import Trained, recipe_words, trained
from tools.families.block_sparse.points import (
    DENSE,
    MLPS,
    OURS,
    SQUARE,
    TORCH,
    by_place,
    of_method,
    of_phase,
    planning_share,
    speed,
    step_ratio,
    where,
)
from tools.judged import FAILS, HOLDS, MIXED, UNDECIDED, Judgement, Verdict, sentence
from tools.stats import Interval
from tools.tables import Column, number

ROWS = 4096
TIMES_TORCH = 1.5
SQUARES = {(32, 0.9): 2.0, (64, 0.8): 2.4, (64, 0.9): 4.5, (128, 0.9): 7.0}  # (block, s)
TIMES_MLP = {"ViT-B": 1.5, "ViT-H": 2.5}
TIMES_BACKWARD, MOST_PLANNING, TIMES_MODEL, MOST_STEP = 2.5, 0.1, 1.3, 1.15
POINTS_BELOW = {0.8: 1.0, 0.9: 2.0}  # at most, of accuracy in percent
COLUMNS = (
    Column("of", "point"),
    number("ratio", "ratio [95%]"),
    number("limit", "limit", "{:g}".format),
)

Limit = Callable[[Case], float | None]
Ratio = Callable[[Sequence[Result]], Interval | None]


@dataclass(frozen=True)
class Compared:
    """The ratio at one point, and what it may be."""

    of: str
    ratio: Interval
    limit: float
    most: bool

    @property
    def status(self) -> str:
        """By the whole interval."""
        ratio = self.ratio
        if not ratio.enough:
            return UNDECIDED
        good, bad = ratio.low >= self.limit, ratio.high < self.limit
        if self.most:
            good, bad = ratio.high <= self.limit, ratio.low > self.limit
        return HOLDS if good else FAILS if bad else UNDECIDED


def judge_all(results: Results, threshold: float) -> list[Verdict]:
    """B1 to B8 on these results. threshold: not used, as each claim has limits of its own."""
    of_dense, of_torch = (_speed(reference) for reference in (DENSE, TORCH))
    forward = by_place(of_phase(results, "forward")).values()
    backward, planning, models, steps = (
        by_place(of_phase(results, phase)).values()
        for phase in ("backward", "planning", "model", "supermask")
    )
    return [
        _judged(
            "B1",
            f"Our BSR product is at least {TIMES_TORCH:g} times as fast as PyTorch's, with blocks "
            "32 and 64, at sparsities 0.8 and 0.9.",
            "layers of both with block 32 or 64",
            forward, of_torch, TORCH, _of_torch, group=_tiles,
        ),
        _judged(
            "B2",
            "At 8192 × 8192 and 4096 rows our BSR product is faster than dense by at least "
            + ", ".join(f"{v:g} (block {b}, s = {s})" for (b, s), v in SQUARES.items()) + " times.",
            "layers of 8192 × 8192 with 4096 rows, dense and bsr",
            forward, of_dense, DENSE, _of_square,
        ),
        _judged(
            "B3",
            "In the MLPs of ViT-B and ViT-H, block 64, s = 0.9, our BSR product is at least "
            f"{TIMES_MLP['ViT-B']:g} and {TIMES_MLP['ViT-H']:g} times as fast as dense.",
            "layers of ViT-B and ViT-H with block 64 and sparsity 0.9, dense and bsr",
            forward, of_dense, DENSE, _of_mlp, group=_model, shown=lambda case: False,
        ),
        _judged(
            "B4",
            "Forward and backward of a BSR layer of 8192 × 8192, block 64, s = 0.9, are at least "
            f"{TIMES_BACKWARD:g} times as fast as dense.",
            "a backward of a layer of 8192 × 8192 with block 64 and sparsity 0.9, dense and bsr",
            backward, of_dense, DENSE, _of_backward,
        ),
        _judged(
            "B5",
            "The lists of a mask of 32 × 32 tiles that is new in each step take at most "
            f"{MOST_PLANNING:g} of the time of the product.",
            "planning with block 32",
            planning, planning_share, "the product", _of_planning, most=True,
            line="plan", group=_tiles,
        ),
        _judged(
            "B6",
            "ViT-H with pruned MLPs, block 64, s = 0.9, is at least "
            f"{TIMES_MODEL:g} times as fast as dense as a whole.",
            "inference of ViT-H with block 64 and sparsity 0.9, dense and bsr",
            models, of_dense, DENSE, _of_model,
        ),
        _judged(
            "B7",
            "A training step of ViT-B on 256 images takes at most "
            f"{MOST_STEP:g} times as long under supermasks.",
            "training steps of ViT-B on 256 images, dense and supermask",
            steps, step_ratio, DENSE, _of_step, most=True, line="supermask",
        ),
        keeps_its_accuracy(results),
    ]  # fmt: skip


def keeps_its_accuracy(results: Results) -> Verdict:
    """B8."""
    judgements = []
    for models in trained(results):
        judgements += [_accuracy(one, models) for one in models if one.method != DENSE]
    judgements.sort(key=lambda judgement: not judgement.decides)
    claim = "The BSR model's accuracy on digits is below dense by at most " + " and ".join(
        f"{most:g} (s = {s:g})" for s, most in POINTS_BELOW.items()
    )
    needed = "models trained on digits, dense and at sparsity 0.8 and 0.9, with the same seeds"
    return Verdict("B8", f"{claim} points.", sentence(judgements, needed), tuple(judgements))


def _judged(
    name: str,
    claim: str,
    needed: str,
    points,
    ratio: Ratio,
    opponent: str,
    limit: Limit,
    *,
    most: bool = False,
    line: str = OURS,
    group: Callable[[Case], str] = where,
    shown: Callable[[Case], bool] = lambda case: True,
) -> Verdict:
    """limit: of a point, or None where it is evidence alone. most: the ratio may be at most that.
    group: points with a limit that are judged together. shown: whether a point without one is told.
    """
    groups: dict[tuple[str, bool], list[Compared]] = {}
    for here in points:
        case, found = here[0].case, ratio(here)
        wanted = limit(case)
        if found is None or (wanted is None and not shown(case)):
            continue
        at = 1.0 if wanted is None else wanted
        words = where(case) if wanted is None else group(case)
        one = Compared(where(case), found, at, most)
        groups.setdefault((words, wanted is not None), []).append(one)
    judgements = [
        Judgement(f"{line} ({words})", opponent, *_told(found), tuple(found), decides)
        for (words, decides), found in groups.items()
    ]
    judgements.sort(key=lambda judgement: not judgement.decides)
    return Verdict(name, claim, sentence(judgements, needed), tuple(judgements), COLUMNS)


def _told(found: Sequence[Compared]) -> tuple[str, str]:
    """(status of all of them, the worst one in words)."""
    statuses = {one.status for one in found}
    status = statuses.pop() if len(statuses) == 1 else MIXED if FAILS in statuses else UNDECIDED
    values = sorted(found, key=lambda one: one.ratio.value)
    worst = values[-1] if found[0].most else values[0]
    kind = "of its time" if worst.most else "times as fast"
    several = f", the worst of {len(found)}: {worst.of}" if len(found) > 1 else ""
    return status, f"{worst.ratio} {kind} (limit {worst.limit:g}){several}"


def _speed(reference: str) -> Ratio:
    def ratio(here: Sequence[Result]) -> Interval | None:
        own = of_method(OURS, here)
        return None if own is None else speed(own, here, reference)

    return ratio


def _plain(case: Case) -> bool:
    """Whether it is what the targets mean: bf16, nothing behind the product."""
    return case.dtype == "bf16" and not case.activation


def _of_torch(case: Case) -> float | None:
    meant = case.block in (32, 64) and case.sparsity in (0.8, 0.9) and case.B == ROWS
    return TIMES_TORCH if meant and _plain(case) else None


def _of_square(case: Case) -> float | None:
    meant = (case.N, case.K) == SQUARE and case.B == ROWS and _plain(case)
    return SQUARES.get((case.block, case.sparsity)) if meant else None


def _of_mlp(case: Case) -> float | None:
    meant = (case.block, case.sparsity, case.B) == (64, 0.9, ROWS) and _plain(case)
    models = (name for name in TIMES_MLP if (case.N, case.K) in MLPS[name])
    return next((TIMES_MLP[name] for name in models), None) if meant else None


def _of_backward(case: Case) -> float | None:
    meant = (case.N, case.K) == SQUARE and (case.block, case.sparsity, case.B) == (64, 0.9, ROWS)
    return TIMES_BACKWARD if meant and _plain(case) else None


def _of_planning(case: Case) -> float | None:
    return MOST_PLANNING if case.block == 32 and _plain(case) else None


def _of_model(case: Case) -> float | None:
    meant = (case.N, case.K) in MLPS["ViT-H"] and (case.block, case.sparsity) == (64, 0.9)
    return TIMES_MODEL if meant and _plain(case) else None


def _of_step(case: Case) -> float | None:
    meant = (case.N, case.K) in MLPS["ViT-B"] and case.B == 256
    return MOST_STEP if meant and _plain(case) else None


def _tiles(case: Case) -> str:
    return f"block {case.block}, s = {case.sparsity:g}"


def _model(case: Case) -> str:
    return next(name for name, both in MLPS.items() if (case.N, case.K) in both)


def _accuracy(one: Trained, models: Sequence[Trained]) -> Judgement:
    below, most = one.below, POINTS_BELOW.get(one.sparsity)
    limit = 1.0 if most is None else most
    decides = one.method == OURS and most is not None and one.first.case.shape == "digits"
    if below is None:
        status, words = UNDECIDED, "dense was not trained with the same seeds"
    else:
        status = HOLDS if below <= limit else FAILS
        words = f"{below:+.2f} points below dense, over {len(one.runs)} seeds (limit {limit:g})"
    line = f"{one.method}, s = {one.sparsity:g} ({recipe_words(models)})"
    return Judgement(line, DENSE, status, words, decides=decides)
