"""How far a result is from the truth, and how far it may be.

The truth is the dense product in float64. The yardstick is plain dense in the case's own dtype
against the same truth: rounding one result costs it about 0.0017 in bf16 (relative Frobenius), and
R rounded partials with rounded sums cost about sqrt(R) times that. A method passes when its
relative error is at most LIMITS[R] times the yardstick's.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

LIMITS = {1: 1.1, 2: 1.5, 4: 2.0, 8: 2.5}
SAMPLE = 2**16
USELESS = 0.5  # a yardstick with half the truth's norm as its error cannot tell right from wrong


class CorrectnessError(AssertionError):
    """A method's result is further from the truth than its dtype explains."""


@dataclass(frozen=True)
class Figure:
    """The error of one tensor.

    relative: ‖a − t‖ / ‖t‖ (Frobenius). max, mean: of |a − t|. max_relative: the largest
    |a − t| / max(|t|, root mean square of t). dense_relative: the yardstick's `relative`.
    ratio: relative / dense_relative. limit: what the ratio may be.
    """

    relative: float
    max: float
    mean: float
    max_relative: float
    dense_relative: float
    ratio: float
    limit: float

    @property
    def passes(self) -> bool:
        """NaN anywhere never passes, nor does anything beside a yardstick that is itself lost."""
        return self.ratio <= self.limit and self.dense_relative < USELESS

    def as_dict(self) -> dict[str, float]:
        """For the result file."""
        return asdict(self)


def limit(ranks: int, entries: int, bound: float | None = None) -> float:
    """What the ratio may be on so many ranks; between the listed numbers, the next higher one's.

    bound: instead of that of the ranks. Under 65536 entries chance has a part in the ratio, about
    1/√entries of it: three times that is allowed on top.
    """
    if bound is None:
        bound = next((bound for size, bound in LIMITS.items() if ranks <= size), math.sqrt(ranks))
    return bound if entries >= SAMPLE else bound * (1 + 3 * max(entries, 1) ** -0.5)


def figure(
    actual: Tensor,
    truth: Tensor,
    dense: float,
    *,
    ranks: int = 1,
    bound: float | None = None,
    enough: float = 0.0,
) -> Figure:
    """The error of `actual` against `truth` (float64, same shape).

    dense: the yardstick, `relative_error` of plain dense. ranks, bound: see `limit`. enough: a
    relative error that passes however small the yardstick's. Raises ValueError for a wrong shape.
    """
    if actual.shape != truth.shape:
        raise ValueError(f"a result of shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    difference = (actual.to(truth.dtype) - truth).abs_()
    size = truth.norm() / math.sqrt(max(truth.numel(), 1))
    relative = difference.norm() / truth.norm()
    scaled = difference / torch.maximum(truth.abs(), size)
    values = torch.stack((relative, difference.max(), difference.mean(), scaled.max())).tolist()
    ratio = values[0] / dense if dense else (1.0 if values[0] == 0 else math.inf)
    allowed = max(limit(ranks, truth.numel(), bound), enough / dense if dense else 0.0)
    return Figure(*values, dense, ratio, allowed)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual − truth‖ / ‖truth‖ in truth's dtype."""
    return float((actual.to(truth.dtype) - truth).norm() / truth.norm())


def require(figures: dict[str, Figure], what: str) -> None:
    """Raises CorrectnessError naming every figure over its limit."""
    bad = [
        f"{name}: relative error {f.relative:.3g} is {f.ratio:.3g} times the yardstick's "
        f"{f.dense_relative:.3g}, allowed {f.limit:g}"
        for name, f in figures.items()
        if not f.passes
    ]
    if bad:
        raise CorrectnessError(f"{what} is wrong, so it is not timed: " + "; ".join(bad))
