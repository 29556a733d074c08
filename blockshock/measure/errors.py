"""How far a result is from the truth, and how far it may be.

The truth is the dense product in float64. The yardstick is plain dense in the case's own dtype
against the same truth: rounding one result costs it about 0.0017 in bf16 (relative Frobenius), and
R rounded partials with rounded sums cost about sqrt(R) times that. A method passes when its
relative error is at most LIMITS[R] times the yardstick's.

The gradient of a model is one vector t of many tensors t_i. Its relative error says little of a
small tensor, and in bf16 it may be 1% and more; so two more figures are held to the yardstick y:

    scale    ⟨a, t⟩ / ⟨t, t⟩ − 1: rounding points everywhere, and little of it along t
    worst    ‖a_i − t_i‖ of each tensor, against ‖y_i − t_i‖ of the same
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

LIMITS = {1: 1.1, 2: 1.5, 4: 2.0, 8: 2.5}
SAMPLE = 2**16
USELESS = 0.5  # a yardstick with half the truth's norm as its error cannot tell right from wrong
# What of the error that passes may lie along the truth. In bf16, of decoders of 32 to 128 columns
# on CPU, it was at most 0.22 of the yardstick's error in gradients, 0.36 in logits of two tokens
# (512 of them), and 0.03 in what AdamW changes.
ALONG = 1 / 3
# Of the root mean square of all entries: an error that passes in a tensor of nearly nothing.
NOTHING = 1e-5


class CorrectnessError(AssertionError):
    """A method's result is further from the truth than its dtype explains."""


@dataclass(frozen=True)
class Worst:
    """The tensor of a vector that is nearest to its limit, or furthest over it.

    relative: ‖a_i − t_i‖ / ‖t_i‖. limit: what it may be.
    """

    tensor: str
    relative: float
    limit: float


@dataclass(frozen=True)
class Yardstick:
    """What plain dense in the case's own dtype is off, of a vector that several tensors make up.

    relative, scale: see `relative_error`, `scale_error`. tensors: how many entries each has, by
    name, in the vector's order. distances: ‖y_i − t_i‖ of each.
    """

    relative: float
    scale: float
    tensors: dict[str, int]
    distances: list[float]


@dataclass(frozen=True)
class Figure:
    """The error of one tensor, or of a vector that several make up.

    relative: ‖a − t‖ / ‖t‖ (Frobenius). max, mean: of |a − t|. max_relative: the largest
    |a − t| / max(|t|, root mean square of t). dense_relative: the yardstick's `relative`.
    ratio: relative / dense_relative. limit: what the ratio may be. scale: `scale_error`, and
    scale_limit: what it may be either way; None where it is not judged. worst: of a vector.
    """

    relative: float
    max: float
    mean: float
    max_relative: float
    dense_relative: float
    ratio: float
    limit: float
    scale: float | None = None
    scale_limit: float | None = None
    worst: Worst | None = None

    @property
    def passes(self) -> bool:
        """NaN anywhere never passes, nor does anything beside a yardstick that is itself lost."""
        return not self.faults()

    def faults(self) -> list[str]:
        """What is over its limit, in words."""
        found, worst = [], self.worst
        if not (self.ratio <= self.limit and self.dense_relative < USELESS):
            found.append(
                f"relative error {self.relative:.3g} is {self.ratio:.3g} times the yardstick's "
                f"{self.dense_relative:.3g}, allowed {self.limit:g}"
            )
        if self.scale is not None and not abs(self.scale) <= self.scale_limit:
            found.append(
                f"its length along the truth is {1 + self.scale:.4g} times the true one, allowed "
                f"1 ± {self.scale_limit:.2g}"
            )
        if worst is not None and not worst.relative <= worst.limit:
            found.append(
                f"relative error {worst.relative:.3g} of {worst.tensor}, allowed {worst.limit:.3g}"
            )
        return found

    def as_dict(self) -> dict:
        """For the result file; without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


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
    scale: float | None = None,
    *,
    ranks: int = 1,
    bound: float | None = None,
    enough: float = 0.0,
) -> Figure:
    """The error of `actual` against `truth` (float64, same shape).

    dense, scale: the yardstick, `relative_error` and `scale_error` of plain dense. Without `scale`
    that of `actual` is not judged: the errors of one small tensor may well have one sign. ranks,
    bound: see `limit`. enough: a relative error that passes however small the yardstick's.
    Raises ValueError for a wrong shape.
    """
    if actual.shape != truth.shape:
        raise ValueError(f"a result of shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    own_scale = None if scale is None else scale_error(actual, truth)
    difference = (actual.to(truth.dtype) - truth).abs_()
    size = truth.norm() / math.sqrt(max(truth.numel(), 1))
    relative = difference.norm() / truth.norm()
    scaled = difference / torch.maximum(truth.abs(), size)
    values = torch.stack((relative, difference.max(), difference.mean(), scaled.max())).tolist()
    ratio = values[0] / dense if dense else (1.0 if values[0] == 0 else math.inf)
    usual = limit(ranks, truth.numel(), bound)
    allowed = max(usual, enough / dense if dense else 0.0)
    found = Figure(*values, dense, ratio, allowed)
    if scale is None:
        return found
    along = max(ALONG * allowed * dense, usual * abs(scale))
    return replace(found, scale=own_scale, scale_limit=along)


def vector_figure(
    actual: Tensor,
    truth: Tensor,
    yardstick: Yardstick,
    *,
    ranks: int = 1,
    enough: float = 0.0,
    astray: int = 0,
) -> Figure:
    """The error of a vector `actual` that several tensors make up, against `truth`.

    The whole and its scale are judged as in `figure`, and so is each tensor:

        ‖a_i − t_i‖ ≤ limit · max(‖y_i − t_i‖, relative · ‖t_i‖)
                      + (enough + 2 √(astray / n_i)) · ‖t_i‖ + NOTHING · √(n_i / n) · ‖t‖

    n_i: the entries of t_i; n: of t. limit: that of two ranks at least, for one tensor's rounding
    depends more than the whole's on how it is computed. relative: the yardstick's of the whole; no
    tensor need be nearer than that. astray: so many entries of each tensor may be off by twice
    their root mean square. The last term lets a tensor pass whose truth is nearly nothing.
    """
    found = figure(actual, truth, yardstick.relative, yardstick.scale, ranks=ranks, enough=enough)
    counts = list(yardstick.tensors.values())
    far, size = _distances(actual, truth, counts), _norms(truth, counts)
    entries = torch.tensor(counts, dtype=torch.float64)
    limits = torch.tensor([limit(max(ranks, 2), n) for n in counts], dtype=torch.float64)
    own = torch.tensor(yardstick.distances, dtype=torch.float64)
    allowed = limits * torch.maximum(own, yardstick.relative * size)
    allowed += (enough + 2 * (astray / entries).sqrt()) * size
    allowed += NOTHING * (entries / entries.sum()).sqrt() * size.norm()
    worst = int((far / allowed).argmax())
    unit = float(size[worst]) or 1.0  # of a tensor of zeros the distance itself is reported
    name = list(yardstick.tensors)[worst]
    of_worst = Worst(name, float(far[worst]) / unit, float(allowed[worst]) / unit)
    return replace(found, worst=of_worst)


def yardstick(plain: Tensor, truth: Tensor, tensors: dict[str, int]) -> Yardstick:
    """Of a vector. tensors: see `Yardstick`."""
    return Yardstick(
        relative_error(plain, truth),
        scale_error(plain, truth),
        tensors,
        _distances(plain, truth, list(tensors.values())).tolist(),
    )


def _distances(actual: Tensor, truth: Tensor, counts: list[int]) -> Tensor:
    """‖a_i − t_i‖ of each tensor, in float64 on the CPU."""
    parts = zip(actual.split(counts), truth.split(counts), strict=True)
    return torch.stack([(a.to(t.dtype) - t).norm() for a, t in parts]).double().cpu()


def _norms(truth: Tensor, counts: list[int]) -> Tensor:
    return torch.stack([t.norm() for t in truth.split(counts)]).double().cpu()


def both_errors(plain: Tensor, truth: Tensor) -> tuple[float, float]:
    """`relative_error` and `scale_error`: what `figure` takes of the yardstick."""
    return relative_error(plain, truth), scale_error(plain, truth)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual − truth‖ / ‖truth‖ in truth's dtype."""
    return float((actual.to(truth.dtype) - truth).norm() / truth.norm())


def scale_error(actual: Tensor, truth: Tensor) -> float:
    """⟨actual, truth⟩ / ⟨truth, truth⟩ − 1 in truth's dtype: 0.01 for what is 1% too long."""
    t = truth.flatten()
    return float(torch.dot(actual.flatten().to(t.dtype) - t, t) / torch.dot(t, t))


def require(figures: dict[str, Figure], what: str) -> None:
    """Raises CorrectnessError naming every figure over its limit."""
    bad = [f"{name}: {fault}" for name, f in figures.items() for fault in f.faults()]
    if bad:
        raise CorrectnessError(f"{what} is wrong, so it is not timed: " + "; ".join(bad))
