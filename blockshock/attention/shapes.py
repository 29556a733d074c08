"""What the inputs of attention must be: every rule is said here once.

    q [batch, heads, Tq, D]      k, v [batch, kv_heads, Tk, D]      out [batch, heads, Tq, D]

Query head h reads key head h // group, group = heads / kv_heads (grouped queries, Ainslie et al.,
arXiv:2305.13245). Tq, Tk, batch and heads may be 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from blockshock.attention import patterns

PRECISE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # plain PyTorch's
FINITE = torch.finfo(torch.float64).max
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    """The sizes of one call."""

    batch: int
    heads: int
    kv_heads: int
    Tq: int
    Tk: int
    D: int

    @classmethod
    def of(cls, q_shape: Iterable[int], k_shape: Iterable[int]) -> "Shape":
        """From the shapes of q and of k (v has k's). Raises ValueError when they do not fit."""
        q_shape, k_shape = tuple(q_shape), tuple(k_shape)
        for size in (*q_shape, *k_shape):
            if not isinstance(size, int) or size < 0:
                raise ValueError(
                    f"a size is {type(size).__name__} or negative; sizes are ints >= 0"
                )
        if len(q_shape) != 4 or len(k_shape) != 4:
            raise ValueError(
                f"q of shape {q_shape} and k of shape {k_shape}: attention takes q [batch, heads, "
                "Tq, D] and k, v [batch, kv_heads, Tk, D]; add the missing dimensions"
            )
        batch, heads, Tq, D = q_shape
        kv_batch, kv_heads, Tk, kv_D = k_shape
        if batch != kv_batch:
            raise ValueError(
                f"q has {batch} batches, k and v have {kv_batch}; expand one to the other's number"
            )
        if kv_D != D or D < 1:
            raise ValueError(
                f"D = {D} in q and {kv_D} in k and v: scores are products over D, so these must be "
                "equal and at least 1; pad the smaller with zeros"
            )
        if heads != kv_heads and (not kv_heads or heads % kv_heads):
            raise ValueError(
                f"{heads} heads in q are not a multiple of {kv_heads} in k and v; each head of k "
                "and v serves equally many of q, so use a divisor of the heads"
            )
        return cls(batch, heads, kv_heads, Tq, Tk, D)

    @property
    def group(self) -> int:
        """How many query heads read one key head."""
        return self.heads // self.kv_heads if self.kv_heads else 1


def tensors(q, k, v) -> None:
    """ValueError for what is no tensor."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: a tensor is needed")


def check(q: Tensor, k: Tensor, v: Tensor, *, pattern=None, scale=None) -> Shape:
    """The sizes of a call; raises ValueError for inputs that no method can take."""
    tensors(q, k, v)
    if k.shape != v.shape:
        raise ValueError(
            f"k is {tuple(k.shape)}, v is {tuple(v.shape)}: each key has one value, of the same D; "
            "give them one shape"
        )
    shape = Shape.of(q.shape, k.shape)
    for what in ("dtype", "device"):
        found = [getattr(tensor, what) for tensor in (q, k, v)]
        if len(set(found)) > 1:
            raise ValueError(
                f"q, k, v have the {what}s {', '.join(map(str, found))}: one is needed; convert "
                "them with .to()"
            )
    reason = dtype_refused("attention", q.dtype, PRECISE) or misfit(shape, pattern)
    reason = reason or scale_refused(scale)
    if reason:
        raise ValueError(reason)
    return shape


def misfit(shape: Shape, pattern) -> str | None:
    """Why a pattern cannot be used with these sizes, or None."""
    if pattern is not None:
        try:
            patterns.check(pattern, shape.Tq, shape.Tk, batch=shape.batch, heads=shape.heads)
        except ValueError as error:
            return str(error)
    return None


def causal_shift(causal, Tq: int, Tk: int) -> int | None:
    """The s of "query i sees keys j <= i + s", or None where every query sees every key.

    causal: False, True (both counted from their first) or "bottom_right" (from their last).

    Raises:
        ValueError: another value.
    """
    if not isinstance(causal, bool) and causal != "bottom_right":
        raise ValueError(
            f'causal = {causal!r}: False, True (query i sees keys j <= i) or "bottom_right" '
            "(j <= i + Tk - Tq) is needed"
        )
    if causal is False:
        return None
    shift = 0 if causal is True else Tk - Tq
    return None if shift >= Tk - 1 else shift


def scale_refused(scale) -> str | None:
    """Why no method can multiply scores by it, or None."""
    if scale is None or (isinstance(scale, int | float) and -FINITE <= scale <= FINITE):
        return None
    return f"scale = {scale!r}: a finite number (int or float) is needed, or None for D ** -0.5"


def pattern_refused(method: str, pattern) -> str | None:
    """Why a method that knows only full and causal attention cannot run, or None."""
    if pattern is None:
        return None
    name = getattr(pattern, "name", repr(pattern))
    return (
        f"pattern {name}: {method} computes full and causal attention only; use "
        "block_sparse, or flex or reference"
    )


def dtype_refused(method: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why a method cannot take this dtype, or None."""
    if dtype in dtypes:
        return None
    names = ", ".join(str(each).removeprefix("torch.") for each in dtypes)
    return f"dtype {str(dtype).removeprefix('torch.')}: {method} takes {names}; convert with .to()"


def gradients_wanted(*tensors: Tensor) -> bool:
    """Whether autograd will record a function of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores and sums are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which products keep the dtype they are written in, whatever the caller set."""
    return torch.autocast(tensor.device.type, enabled=False)
