"""Ratios of medians with an interval, and what may be concluded from one.

Samples of a case are consecutive rounds, and neighbours resemble each other: clocks and
temperatures wander slowly. Resampling them one by one would make the interval too narrow, so whole
blocks of consecutive rounds are resampled (circular block bootstrap, Politis and Romano 1992). The
block is as long as is best for the lag-1 correlation of the samples (Politis and White 2004, for
an AR(1) process; the estimate corrected for its bias in short series), and the interval is widened
by Student's factor for the number of blocks, since few blocks show too little of the spread.
Methods measured interleaved, round by round, in one run are resampled together: what slowed a
round slowed it for each of them, and cancels in the ratio.

Of 300 pairs of equal AR(1) series of 20 to 100 rounds, the 95% interval missed 1 in 1 to 3% at a
lag-1 correlation of 0, in 2 to 6% at 0.5, in 2 to 9% at 0.8.

Between two runs a machine drifts by a few percent more, of which one run cannot know. `ratio`
speaks of the rounds of two runs, and `ALONE` is the threshold that belongs to it. `ratio_of_runs`
has several runs a side and resamples in two levels, runs and then rounds in a run. The deviations
of the runs from their side's mean are pooled over both sides, because few runs a side show too
little; Student's factor for their number widens the interval. Of 400 equal pairs of 2, 3 and 5 runs
a side that drift by 2% (rounds by 0.5%), the interval missed 1 in 4, 5 and 7%, and that of one run
a side in 87 to 89%. Where rounds scatter more than runs it is too wide and misses 1 in at most 1%,
since the scatter of the rounds is in the deviation of a run as well.

Everything is seeded: the same files give the same figures.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

import numpy as np

DRAWS = 2000
CONFIDENCE = 0.95
# Below six samples no distribution-free 95% interval of a median exists: 2 · 0.5⁵ > 0.05.
ENOUGH = 6
THRESHOLD = 0.02
# With one run a side a smaller change is no change. Dense and library methods, which no commit had
# changed, were measured again on H200 (11 pairs of runs of 16 to 72 cases): 95% of the medians of a
# pair differed by at most 2.7 to 8.7%, in 8 of the pairs by at most 5.9%.
ALONE = 0.06


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval; `samples` is the fewest that any part of it was made from."""

    value: float
    low: float
    high: float
    samples: int

    @property
    def enough(self) -> bool:
        """Whether there were samples enough for the interval to mean anything."""
        return self.samples >= ENOUGH

    def __str__(self) -> str:
        if not self.enough:
            return f"{self.value:.3f} [{self.samples} samples: no interval]"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def block_length(samples: np.ndarray) -> int:
    """How many consecutive rounds are drawn together; 1 where neighbours are unrelated."""
    n = len(samples)
    # Ranks, so that one outlier does not decide what the correlation is; equal times, which a
    # coarse clock gives, share theirs.
    _, place, count = np.unique(samples, return_inverse=True, return_counts=True)
    if n < 4 or len(count) == 1:
        return 1
    centred = (np.cumsum(count) - count / 2)[place] - n / 2
    correlation = (centred[1:] @ centred[:-1]) / (centred @ centred)
    correlation = min(max(correlation + (1 + 3 * correlation) / n, 0.0), 0.9)
    best = (1.5 * n) ** (1 / 3) * (2 * correlation / (1 - correlation**2)) ** (2 / 3)
    return int(np.clip(np.ceil(max(best, round(n ** (1 / 3)))), 1, max(1, n // 4)))


@functools.lru_cache(maxsize=1024)
def median_draws(
    groups: tuple[tuple[float, ...], ...], seed: int = 0
) -> tuple[list[np.ndarray], float]:
    """Medians of DRAWS block resamples of each group, and the number of blocks in a resample.

    All groups are resampled by the same rounds, so they have the same length.
    """
    arrays = [np.asarray(group, dtype=float) for group in groups]
    n = len(arrays[0])
    length = max(block_length(array) for array in arrays)
    starts = np.random.default_rng([seed, n]).integers(0, n, (DRAWS, -(-n // length)))
    rounds = (starts[:, :, None] + np.arange(length)) % n
    rounds = rounds.reshape(DRAWS, -1)[:, :n]
    return [np.median(array[rounds], axis=1) for array in arrays], n / length


def combine(
    function: Callable[..., np.ndarray],
    groups: Sequence[Sequence[float]],
    *,
    paired: Sequence[Sequence[int]] = (),
) -> Interval:
    """A positive `function` of the groups' medians, with its interval.

    `paired` names the groups, by index, whose samples are of the same rounds; groups of different
    lengths are resampled apart all the same.
    """
    together = [list(part) for part in paired if len({len(groups[i]) for i in part}) == 1]
    alone = set(range(len(groups))) - {index for indices in together for index in indices}
    draws: dict[int, np.ndarray] = {}
    fewest = float("inf")
    for indices in together + [[index] for index in sorted(alone)]:
        medians, blocks = median_draws(tuple(tuple(groups[i]) for i in indices), indices[0])
        draws |= dict(zip(indices, medians, strict=True))
        fewest = min(fewest, blocks)
    value = float(function(*(median(group) for group in groups)))
    drawn = function(*(draws[index] for index in range(len(groups))))
    return _interval(value, drawn, fewest, min(len(group) for group in groups))


def ratio(new: Sequence[float], old: Sequence[float], *, paired: bool = False) -> Interval:
    """median(new) / median(old): above 1 means that `new` takes longer."""
    return combine(lambda a, b: a / b, [new, old], paired=[(0, 1)] if paired else ())


def ratio_of_runs(new: Sequence[Sequence[float]], old: Sequence[Sequence[float]]) -> Interval:
    """Geometric mean of the runs' medians, new over old; the interval holds the spread of runs.

    With one run a side it is `ratio`, which knows of no such spread.
    """
    freedom = len(new) + len(old) - 2
    if not freedom:
        return ratio(new[0], old[0])
    runs = [*new, *old]
    medians = np.log([median(run) for run in runs])
    sides = np.split(medians, [len(new)])
    apart = np.concatenate([side - side.mean() for side in sides]) * np.sqrt(len(runs) / freedom)
    # One row a run: what its median might have been instead, had other rounds been measured.
    rounds = [
        np.log(median_draws((tuple(run),), seed)[0][0]) - middle
        for seed, (run, middle) in enumerate(zip(runs, medians, strict=True))
    ]
    scatter = np.stack(rounds) + apart[:, None]
    chance = np.random.default_rng([DRAWS, len(runs)])
    drawn = [
        scatter[
            chance.integers(0, len(runs), (DRAWS, len(side))),
            chance.integers(0, DRAWS, (DRAWS, len(side))),
        ].mean(axis=1)
        for side in sides
    ]
    value = float(np.exp(sides[0].mean() - sides[1].mean()))
    fewest = min(len(run) for run in runs)
    return _widened(value, drawn[0] - drawn[1], _student(freedom), fewest)


def judge(interval: Interval, threshold: float = THRESHOLD) -> str:
    """same, faster, slower or unsure, for a ratio of times.

    slower, faster: the ratio is beyond the threshold and the interval excludes 1.
    same: the whole interval lies within the threshold, so sameness is shown, not assumed.
    unsure: anything else, and whatever has fewer than six samples on a side.
    """
    low, high = 1 / (1 + threshold), 1 + threshold
    if not interval.enough:
        return "unsure"
    if interval.value > high and interval.low > 1:
        return "slower"
    if interval.value < low and interval.high < 1:
        return "faster"
    if low <= interval.low and interval.high <= high:
        return "same"
    return "unsure"


def _interval(value: float, draws: np.ndarray, blocks: float, samples: int) -> Interval:
    factor = _student(max(blocks, 2.0) - 1) * np.sqrt(max(blocks, 2.0) / (max(blocks, 2.0) - 1))
    return _widened(value, np.log(draws) - np.log(value), factor, samples)


def _widened(value: float, deviations: np.ndarray, factor: float, samples: int) -> Interval:
    """The interval from the draws' deviations, which are logarithms, `factor` times as wide."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(deviations, [tail, 1 - tail])
    # The figure lies in its interval, even where few samples make it the extreme of its own draws.
    return Interval(
        value,
        value * float(np.exp(min(low * factor, 0))),
        value * float(np.exp(max(high * factor, 0))),
        samples,
    )


def _student(freedom: float) -> float:
    """Student's 97.5% quantile over the normal one (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return 1 + sum(term / freedom ** (i + 1) for i, term in enumerate(terms)) / z
