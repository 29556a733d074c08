"""What a pattern is, and what it says of given pairs of queries and keys.

    mask[b, h, i, j] = predicate(b, h, i, j)                      True = query i sees key j
    mask[b, h, i, j] = low_i <= j < high_i                        the same, where rows are intervals
    sparsity s = 1 - attended / (batch * heads * Tq * Tk)         ideal speedup = 1 / (1 - s)

A predicate takes int tensors that broadcast, or the scalars that FlexAttention's `mask_mod` gets:
it is built of elementwise operations and of reading tensors at these indices. Queries and keys are
both counted from 0 (top-left), also where Tq and Tk differ. The patterns are in `patterns.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from numbers import Integral
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from blockshock.attention import reads

SIZES = ("batch", "heads", "Tq", "Tk")
SHAPES = 64  # for which a predicate that was found right is remembered
PAIRS = 4096  # that a predicate is asked about in each batch entry and head
CHUNK_CPU, CHUNK = 1 << 20, 1 << 24  # pairs looked at in one go; on a CPU they stay in the cache


@dataclass(frozen=True, eq=False)
class Pattern:
    """A rule for attention. Usually made by a builder below; `check` says where it applies."""

    name: str
    predicate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(batch, head, query, key), ints that broadcast -> bool tensor that broadcasts alike."""
    interval: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None
    """(query [n], Tk) -> low [n], high [n], int: the same rule. Rows with low >= high are empty."""
    per_batch: bool = (
        False  # whether the predicate reads `batch`; if not, all see what batch 0 sees
    )
    per_head: bool = False  # likewise `head`
    sizes: tuple[int | None, ...] = (None,) * 4  # of batch, heads, Tq, Tk it fits; None: any
    recipe: tuple | None = None  # (builder, arguments): how a copy or a pickle makes it again
    parts: tuple[Callable, ...] = ()  # the predicates that this one joins
    depends_on: tuple | None = None  # what may change its answers (`reads.py`); None: its functions
    renewals: reads.Count = field(default_factory=reads.Count, init=False, repr=False)
    number: int = field(default_factory=itertools.count().__next__, init=False, repr=False)

    @property
    def shape(self) -> tuple[int, int] | None:
        """The only (Tq, Tk) it fits, or None where one of them is free."""
        return None if None in self.sizes[2:] else self.sizes[2:]

    def __reduce_ex__(self, protocol):
        of_fields = self.name, self.predicate, self.interval, self.per_batch, self.per_head
        rest = self.sizes, None, self.parts, self.depends_on[:-1]
        return self.recipe or (Pattern, (*of_fields, *rest))

    def renew(self) -> None:
        """Forgets the lists made of this pattern, and of those that it was joined into.

        For a rule whose answers have changed in a way that is not noticed (`reads.py`).
        """
        self.renewals.number += 1

    def __post_init__(self):
        found = (self.predicate, self.interval) if self.depends_on is None else self.depends_on
        object.__setattr__(self, "depends_on", (*found, self.renewals))
        _NUMBERED[self.number] = self
        if self.interval and (self.per_batch or self.per_head):
            raise ValueError(
                f"pattern {self.name!r} has an interval and is per batch or per head: intervals "
                "are shared by all; leave out interval="
            )


_NUMBERED: WeakValueDictionary = WeakValueDictionary()


def numbered(number: int) -> Pattern:
    """The pattern that a compiled graph names by this number; RuntimeError if it is no more."""
    if number not in _NUMBERED:
        raise RuntimeError(
            "the pattern of this compiled attention is gone; keep it and compile anew"
        )
    return _NUMBERED[number]


def _fix(thing) -> str:
    if isinstance(thing, Tensor):
        return f"pattern {thing.dtype} {tuple(thing.shape)}: give a mask to from_mask"
    if callable(thing):
        return f"pattern {getattr(thing, '__name__', thing)}: call it, or give it to predicate"
    return f"pattern {thing!r}: make one with a builder, e.g. band(256)"


def check(pattern: Pattern, Tq: int, Tk: int, *, batch: int = 1, heads: int = 1) -> None:
    """ValueError unless the pattern fits these sizes, which are ints >= 0."""
    if not isinstance(pattern, Pattern):
        raise ValueError(_fix(pattern))
    at_least(0, Tq=Tq, Tk=Tk, batch=batch, heads=heads)
    for what, size, only in zip(SIZES, (batch, heads, Tq, Tk), pattern.sizes, strict=True):
        if only is not None and size != only:
            raise ValueError(
                f"{what} {size}: pattern {pattern.name} was made for {what} {only}; "
                "make one for this size"
            )


def evaluate(pattern: Pattern, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The predicate at int tensors that broadcast: bool, of their common shape (maybe expanded).

    Raises ValueError where the predicate returns anything but a bool tensor of such a shape, or
    reduces: what it says of a pair must not depend on the pairs that it is asked about at once.
    """
    at = batch, head, query, key
    shape = torch.broadcast_shapes(*(index.shape for index in at))
    attends = _asked(pattern, pattern.predicate, at)
    rule = f"the predicate of pattern {pattern.name!r} returned"
    if not isinstance(attends, Tensor) or attends.dtype != torch.bool:
        kind = attends.dtype if isinstance(attends, Tensor) else type(attends).__name__
        raise ValueError(f"{rule} {kind}: it must return a bool tensor; return a comparison")
    if attends.device != query.device:
        raise ValueError(
            f"{rule} a tensor on {attends.device} for indices on {query.device}: move what it "
            "reads there, or ask for a table on that device"
        )
    try:
        whole = attends.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{rule} shape {tuple(attends.shape)} for indices of shapes {tuple(query.shape)} and "
            f"{tuple(key.shape)}: it must broadcast with them; use elementwise operations"
        ) from None
    # A reduction looks like a rule of the query, the key or the head alone, or is hidden by a join.
    suspects = pattern.parts or (pattern.predicate,) * (attends.shape != shape)
    if whole.numel() and not all(_elementwise(pattern, part, at) for part in suspects):
        raise ValueError(
            f"{rule} one answer for several pairs, as any() and all() do: it must tell of each "
            "pair by itself; use elementwise operations"
        )
    _check_alone(pattern, at, whole)
    return whole


def _asked(pattern: Pattern, predicate: Callable, at: tuple[Tensor, ...]):
    try:
        if torch.compiler.is_compiling():
            return predicate(*at)
        if torch.is_inference_mode_enabled():  # outside, a write to an index of it is an error
            with torch.inference_mode(False), torch.no_grad():
                return predicate(*at)
        before = [index._version for index in at if not index.is_inference()]
        answer = predicate(*at)
        after = [index._version for index in at if not index.is_inference()]
        if before != after:
            raise RuntimeError("it writes to its arguments: write i - 5, not i -= 5")
        return answer
    except (TypeError, RuntimeError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"the predicate of pattern {pattern.name!r} failed: {error}; it takes int tensors "
            "(batch, head, query, key), and combines comparisons by &, | and ~"
        ) from error


def _elementwise(pattern: Pattern, predicate: Callable, at: tuple[Tensor, ...]) -> bool:
    """Whether it gives one answer for each pair where indices do not broadcast: 2 x 2 are asked."""
    plane = [index.flatten()[0] for index in at[:2]]
    few = [index[(slice(2),) * index.dim()] for index in at[2:]]
    shape = torch.broadcast_shapes(*(index.shape for index in few))
    query, key = (index.expand(shape) for index in few)
    # Once with scalars: a table may be read as table[head][query, key].
    return any(
        getattr(_asked(pattern, predicate, (*planes, query, key)), "shape", None) == shape
        for planes in (plane, [index.expand(shape) for index in plane])
    )


def _check_alone(pattern: Pattern, at: tuple[Tensor, ...], whole: Tensor) -> None:
    """ValueError where a pair's answer is another when it alone is asked about.

    Nine pairs, once for each pattern and shape: j <= i + (j.max() - i.max()) has the right shape,
    and another meaning in every chunk. A joined pattern is asked part by part, since one part may
    hide what the other does. Not under a compiler or a graph's capture, where no value is known.
    """
    if torch.compiler.is_compiling() or type(whole) is not Tensor or captured(whole.device):
        return
    seen = reads.kept(pattern).setdefault("asked alone", set())
    if whole.numel() < 2 or whole.shape in seen:
        return
    places = [(0, size // 2, size - 1) for size in whole.shape[-2:]]
    lead = [size // 2 for size in whole.shape[:-2]]
    pairs = [(*lead, *place) for place in product(*places)]
    for predicate in pattern.parts or (pattern.predicate,):
        together = _asked(pattern, predicate, at).expand(whole.shape)
        alone = [_asked(pattern, predicate, [_one(i, pair) for i in at]) for pair in pairs]
        fits = all(isinstance(answer, Tensor) and answer.numel() == 1 for answer in alone)
        if not fits or not torch.equal(
            torch.stack([answer.reshape(()) for answer in alone]),
            torch.stack([together[pair] for pair in pairs]),
        ):
            raise ValueError(
                f"the predicate of pattern {pattern.name!r} answers for a pair by the others that "
                "it is asked about, as max(), cumsum() and flip() do: it must tell of each pair by "
                "itself; use elementwise operations, and sizes that are known beforehand"
            )
    if len(seen) == SHAPES:
        seen.clear()
    seen.add(whole.shape)


def _one(index: Tensor, pair: tuple[int, ...]) -> Tensor:
    """The entry of an index for one pair, with all its dims: scalars promote to other dtypes."""
    for dim, place in zip(range(-index.dim(), 0), pair[len(pair) - index.dim() :], strict=True):
        index = index.narrow(dim, min(place, index.shape[dim] - 1), 1)
    return index


def check_planes(pattern: Pattern, shape: tuple[int, int, int, int], device) -> None:
    """ValueError where batch entries or heads see differently and the pattern does not say so.

    shape: batch, heads, Tq, Tk. A sample of PAIRS pairs is asked about in each of them: half of
    the keys lie near their query, as windows do. Once for these sizes; not under a compiler.
    """
    said = pattern.per_batch, pattern.per_head
    batch, heads, Tq, Tk = shape
    if pattern.interval or torch.compiler.is_compiling() or 0 in shape:
        return
    if all(several or size < 2 for several, size in zip(said, shape[:2], strict=True)):
        return
    device = torch.device(device)
    seen = reads.kept(pattern).setdefault("asked in planes", set())
    if shape in seen or captured(device):
        return
    query, key = _sample(Tq, Tk, device)
    batches, head = (torch.arange(n, device=device) for n in (batch, heads))

    def ask(b, h):
        return _asked(pattern, pattern.predicate, (batches[b], head[h], query, key))

    differ = torch.zeros(2, dtype=torch.bool, device=device)
    for dim, of in enumerate(said):
        planes = [(n, heads - 1) if dim == 0 else (batch - 1, n) for n in range(shape[dim])]
        first = None if of or len(planes) < 2 else ask(*planes[0])
        for plane in planes[1:] if first is not None else ():
            differ[dim] |= (ask(*plane) != first).any()
    for name, found in zip(("batch", "head"), differ.tolist(), strict=True):
        if found:
            raise ValueError(
                f"the predicate of pattern {pattern.name!r} answers by its {name}, and the pattern "
                f"says per_{name}=False: every {name} would see what {name} 0 sees; make it with "
                f"per_{name}=True"
            )
    if len(seen) == SHAPES:
        seen.clear()
    seen.add(shape)


def _sample(Tq: int, Tk: int, device) -> tuple[Tensor, Tensor]:
    """PAIRS queries, and a key of each: anywhere, or 2^u away. The same at each call."""
    generator = torch.Generator().manual_seed(0)
    query, key, away, half = torch.rand(4, PAIRS, generator=generator, device="cpu").double()
    query, key = (query * Tq).long(), (key * Tk).long()
    away = (2 * away - 1).sign() * (max(Tq, Tk) ** (2 * away - 1).abs())
    key = torch.where(half < 0.5, key, (query + away.long()).clamp(0, Tk - 1))
    return query.to(device), key.to(device)


def rows(pattern: Pattern, Tq: int, Tk: int, device) -> tuple[Tensor, Tensor]:
    """low, high, int64 [Tq], of a pattern with an interval: 0 <= low <= high <= Tk."""
    low, high = pattern.interval(torch.arange(Tq, device=device), Tk)
    for end in (low, high):
        if end.shape != (Tq,) or end.is_floating_point() or end.dtype == torch.bool:
            raise ValueError(
                f"the interval of pattern {pattern.name!r} gave {end.dtype} {tuple(end.shape)} for "
                f"{Tq} queries: it must give low and high, int [{Tq}]"
            )
    high = high.clamp(0, Tk)
    return torch.minimum(low.clamp(min=0), high), high


@torch.no_grad()
def sparsity(
    pattern: Pattern, Tq: int, Tk: int, *, batch: int = 1, heads: int = 1, device="cpu"
) -> float:
    """The share of the batch * heads * Tq * Tk pairs that is not attended, counted one by one.

    0 where there are no pairs. ValueError where the pattern does not fit (`check`).
    """
    check(pattern, Tq, Tk, batch=batch, heads=heads)
    planes = (batch if pattern.per_batch else 1) * (heads if pattern.per_head else 1)
    if batch * heads * Tq * Tk == 0:
        return 0.0
    if pattern.interval:
        low, high = rows(pattern, Tq, Tk, device)
        return 1 - int((high - low).sum()) / (Tq * Tk)
    attended = torch.zeros((), dtype=torch.int64, device=device)
    batches, head, query, key = (torch.arange(n, device=device) for n in (batch, heads, Tq, Tk))
    chunk = chunk_of(device)
    columns = min(Tk, chunk)
    for plane in range(planes):
        b, h = divmod(plane, heads) if pattern.per_head else (plane, 0)
        for some in query.split(max(1, chunk // columns)):
            for keys in key.split(columns):
                attended += evaluate(pattern, batches[b], head[h], some[:, None], keys).sum()
    return 1 - int(attended) / (planes * Tq * Tk)


def ideal_speedup(sparsity: float) -> float:
    """1 / (1 - s): what leaving out a share s of the work can give; inf where nothing is left."""
    return 1 / (1 - sparsity) if sparsity < 1 else float("inf")


def chunk_of(device) -> int:
    """How many pairs to look at in one go there."""
    return CHUNK_CPU if torch.device(device).type == "cpu" else CHUNK


def captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured there."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def at_least(least: int, **values) -> None:
    for name, value in values.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or not least <= value < 2**31:
            raise ValueError(f"{name} {value!r}: an int of at least {least} (below 2^31) is needed")
