"""The patterns of attention: each builder gives a rule that says which keys each query attends to.

    full 1    causal j <= i + shift    band |i - j| <= w
    strided, global_band: a band and some columns
    both(a, b) = a AND b       either(a, b) = a OR b

A pattern has no size: nothing here is as large as Tq * Tk unless the caller brought it
(`from_mask`). Patterns are equal by identity, and a builder called again with equal arguments gives
the same object, so what is made from a pattern can be kept beside it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from numbers import Integral, Real

import torch
from torch import Tensor

from blockshock.attention import reads
from blockshock.attention.joined import both, either
from blockshock.attention.rules import (
    Pattern,
    at_least,
    check,
    check_planes,
    evaluate,
    ideal_speedup,
    sparsity,
)

__all__ = [
    "Pattern",
    "band",
    "both",
    "causal",
    "causal_band",
    "check",
    "check_planes",
    "documents",
    "either",
    "evaluate",
    "from_mask",
    "full",
    "global_band",
    "ideal_speedup",
    "predicate",
    "random_blocks",
    "sparsity",
    "strided",
]

_32_BITS = (1 << 32) - 1
KEPT = 16  # patterns of each builder, and with them their tables


def _shared(build):
    """Equal arguments, however they are written, give the same object, while it is among KEPT."""
    signature, kept = inspect.signature(build), functools.lru_cache(maxsize=KEPT)(build)

    @torch.compiler.assume_constant_result  # a compiled graph keeps the pattern, and its lists
    @functools.wraps(build)
    def builder(*args, **options) -> Pattern:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        hashable = all(type(value).__hash__ for value in bound.arguments.values())
        made = (kept if hashable else build)(*bound.args, **bound.kwargs)
        return _by_recipe(made, builder, tuple(bound.arguments.values()))

    return builder


def _by_recipe(pattern: Pattern, builder: Callable, arguments: tuple) -> Pattern:
    """A pattern that its arguments, which cannot change, say all of."""
    object.__setattr__(pattern, "recipe", (builder, arguments))
    object.__setattr__(pattern, "depends_on", (pattern.renewals,))
    return pattern


@_shared
def full() -> Pattern:
    """Every query sees every key."""
    return Pattern(
        "full",
        lambda batch, head, query, key: (query >= 0) & (key >= 0),
        lambda query, Tk: (torch.zeros_like(query), torch.full_like(query, Tk)),
    )


@_shared
def causal(shift: int = 0) -> Pattern:
    """Query i sees keys j <= i + shift. shift = Tk − Tq: the last query sees the last key."""
    at_least(1 - 2**31, shift=shift)
    return Pattern(
        f"causal({shift})" if shift else "causal",
        lambda batch, head, query, key: key <= query + shift,
        lambda query, Tk: (torch.zeros_like(query), (query + shift + 1).clamp(0, Tk)),
    )


@_shared
def band(window: int) -> Pattern:
    """|i - j| <= window: Longformer's sliding window (arXiv:2004.05150). window >= 0."""
    at_least(0, window=window)
    return Pattern(
        f"band({window})",
        lambda batch, head, query, key: (query - key).abs() <= window,
        lambda query, Tk: ((query - window).clamp(0, Tk), (query + window + 1).clamp(max=Tk)),
    )


@_shared
def causal_band(window: int) -> Pattern:
    """0 <= i - j <= window: the sliding window of a decoder. window >= 0."""
    at_least(0, window=window)
    return Pattern(
        f"causal_band({window})",
        lambda batch, head, query, key: (key <= query) & (query - key <= window),
        lambda query, Tk: ((query - window).clamp(0, Tk), (query + 1).clamp(max=Tk)),
    )


@_shared
def strided(stride: int, window: int | None = None) -> Pattern:
    """|i - j| <= window, and every stride-th key from the query: (i - j) mod stride = 0.

    Both heads of the Sparse Transformer's strided attention in one (arXiv:1904.10509, section 4.2),
    without its causal half: `both(causal(), ...)` adds that. window is stride, as there, if None.
    """
    window = stride if window is None else window
    at_least(1, stride=stride)
    at_least(0, window=window)
    return Pattern(
        f"strided({stride}, {window})",
        lambda batch, head, query, key: (
            ((query - key).abs() <= window) | ((query - key) % stride == 0)
        ),
    )


@_shared
def global_band(tokens: int, window: int) -> Pattern:
    """The band, and the first `tokens` queries see all and are seen by all.

    Longformer (arXiv:2004.05150), and BigBird without its random blocks (arXiv:2007.14062).
    """
    at_least(0, tokens=tokens, window=window)
    return Pattern(
        f"global_band({tokens}, {window})",
        lambda batch, head, query, key: (
            (query < tokens) | (key < tokens) | ((query - key).abs() <= window)
        ),
    )


@_shared
def random_blocks(block: int, share: float, seed: int = 0, per_head: bool = False) -> Pattern:
    """Each block x block tile of pairs is kept with probability `share`, whole or not at all.

    BigBird's random blocks (arXiv:2007.14062), drawn independently: a row of blocks may have none.
    A tile's fate is a hash of (seed, head if per_head, query block, key block): it depends on no
    state and is the same on every device and for every size. 0 <= share <= 1; any int seed, modulo
    2^64.
    """
    at_least(1, block=block)
    if not isinstance(share, Real) or not 0 <= share <= 1:
        raise ValueError(f"share {share!r}: a share of blocks is a number from 0 to 1")
    if not isinstance(seed, Integral):
        raise ValueError(f"seed {seed!r}: a seed is an int")
    threshold = round(share * 2**32)
    start = _mix(_mix(int(seed)) + (int(seed) >> 32))

    def predicate(batch, head, query, key):
        state = _mix((head.long() if per_head else 0 * head.long()) + start)
        state = _mix(state + query.long() // block)
        return _mix(state + key.long() // block) < threshold

    ending = ", per_head=True" if per_head else ""
    name = f"random_blocks({block}, {share}, {seed}{ending})"
    return Pattern(name, predicate, per_head=bool(per_head))


@torch.compiler.assume_constant_result
def documents(lengths: Iterable[int]) -> Pattern:
    """Documents laid end to end in one sequence of sum(lengths) tokens; each sees only itself.

    lengths: ints >= 1, in a list, a tuple or an int tensor [n]. The pattern fits Tq = Tk = sum.
    """
    given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise ValueError(f"lengths {lengths!r}: a list of ints is needed, one a document")
    given = tuple(given)
    if not given:
        raise ValueError("lengths is empty: at least one document is needed; use full() for T = 0")
    for index, length in enumerate(given):
        at_least(1, **{f"lengths[{index}]": length})
    given = tuple(int(length) for length in given)
    return _by_recipe(_documents(given), documents, (given,))


@functools.lru_cache(maxsize=KEPT)
@torch.inference_mode(False)  # tensors of inference mode could not be saved for a backward later
def _documents(lengths: tuple[int, ...]) -> Pattern:
    sizes = torch.tensor(lengths, device="cpu")
    stop = sizes.cumsum(0)
    rows = torch.stack([stop - sizes, stop]).repeat_interleave(sizes, dim=1)  # [2, T]
    bounds = _copies(rows)  # bounds of its document for each token: the start also names it
    T = rows.shape[1]

    def predicate(batch, head, query, key):
        start = bounds(query.device)[0]
        return start[query] == start[key]

    def interval(query, Tk):
        low, high = bounds(query.device)[:, query]
        return low, high

    shown = ", ".join(map(str, lengths)) if len(lengths) <= 4 else f"{len(lengths)} of {T} tokens"
    return Pattern(f"documents({shown})", predicate, interval, sizes=(None, None, T, T))


@torch.compiler.disable(reason="a pattern of a tensor is made outside a compiled function")
def from_mask(mask: Tensor) -> Pattern:
    """mask, bool [Tq, Tk], [heads, Tq, Tk] or [batch, heads, Tq, Tk]; dims of size 1 broadcast.

    It is not copied: written in place, it is read anew at the next use (a write through `.data` or
    NumPy is not noticed: call `renew()` on the pattern then). Each call gives a pattern of its own;
    keep the pattern to keep what is made from it.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"a mask of {kind}: a bool tensor is needed, True where a query attends; compare "
            "(scores > -inf, mask != 0)"
        )
    if mask.dim() not in (2, 3, 4):
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)}: it must be [Tq, Tk], [heads, Tq, Tk] or "
            "[batch, heads, Tq, Tk]; reshape it"
        )
    view = mask.detach()[(None,) * (4 - mask.dim())]
    # An expanded dim (stride 0) is the same all along, like one of size 1.
    sides = zip(view.shape, view.stride(), strict=True)
    many = [size != 1 and (stride != 0 or size == 0) for size, stride in sides]
    fixed = tuple(size if size != 1 else None for size in view.shape)
    at = _copies(view)

    def predicate(batch, head, query, key):
        indices = batch, head, query, key
        inside = [i.long() * several for i, several in zip(indices, many, strict=True)]
        return at(query.device)[tuple(inside)]

    name = f"mask({' x '.join(map(str, mask.shape))})"
    recipe = from_mask, (mask,)
    return Pattern(name, predicate, None, *many[:2], fixed, recipe, depends_on=(view,))


@torch.compiler.disable(reason="a pattern is made once, outside the compiled function")
def predicate(
    fn: Callable, name: str | None = None, *, per_batch: bool = False, per_head: bool = False
) -> Pattern:
    """fn(batch, head, query, key) -> bool tensor, True where the query attends.

    Say per_batch or per_head if fn reads those: if not, lists are made for batch 0 and head 0, and
    a sample of pairs must have the same answers in all others, or a ValueError says so. What fn
    returns is checked where it is used (`evaluate`). Each call gives another pattern, with tables
    of its own: make it once.

    fn is asked once for each size, and again when a tensor it reads was written to or replaced, or
    a number, a string or an attribute that it names has another value. Other changes are not
    noticed (the contents of NumPy arrays, writes through `.data`; `reads.py` has the whole list):
    call `renew()` on the pattern after those. A captured CUDA graph keeps the lists it was captured
    with.
    """
    if not callable(fn):
        raise ValueError(f"fn {fn!r}: a function of (batch, head, query, key) is needed")
    name = name or getattr(fn, "__name__", type(fn).__name__)
    reads = bool(per_batch), bool(per_head)
    again = _predicate, (fn, name, *reads)
    return Pattern(name, fn, None, *reads, recipe=again)


def _predicate(fn, name, per_batch, per_head) -> Pattern:
    return predicate(fn, name, per_batch=per_batch, per_head=per_head)


def _mix(state: Tensor) -> Tensor:
    """32 bits that depend on each of 32, int64 (or int) in [0, 2^32); state is taken modulo 2^32.

    https://github.com/skeeto/hash-prospector, "lowbias32", after an odd step: 0 does not stay 0.
    """
    state = (state + 0x9E3779B9) & _32_BITS
    state = ((state ^ (state >> 16)) * 0x7FEB352D) & _32_BITS
    state = ((state ^ (state >> 15)) * 0x846CA68B) & _32_BITS
    return state ^ (state >> 16)


def _copies(tensor: Tensor) -> Callable[[torch.device], Tensor]:
    """device -> the tensor there, moved once for each version of it."""
    kept = {}

    def at(device: torch.device) -> Tensor:
        if device == tensor.device or torch.compiler.is_compiling():
            return tensor.to(device)
        now = reads.version(tensor)
        if device not in kept or kept[device][0] != now:
            with torch.inference_mode(False), torch.no_grad():
                kept[device] = now, tensor.to(device)
        return kept[device][1]

    return at
