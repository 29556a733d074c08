"""How much arithmetic attention is, as FlashAttention counts it.

    forward    2 products (Q Kᵀ, P V) of 2 D operations a pair             4 · pairs · D
    backward   5 products (Q Kᵀ again, dO Vᵀ, Pᵀ dO, dSᵀ Q, dS K)         10 · pairs · D

A pair is one query that attends to one key, in one batch and head. Softmax is not counted, and
neither are pairs that a mask hides, whether a method computes them or not: so rates of different
methods compare. Dao, arXiv:2307.08691, section 4.1.
"""

from blockshock.attention import patterns, shapes

PER_PAIR = {"forward": 4, "backward": 10, "both": 14}  # times D


def pairs(pattern, causal: bool, Tq: int, Tk: int, batch: int, heads: int, *, device="cpu") -> int:
    """How many pairs attend; exact.

    pattern: a Pattern or None for all pairs; causal: as in the methods, as well. device is where a
    pattern without intervals is counted, tile by tile.
    """
    shift = shapes.causal_shift(causal, Tq, Tk)
    if pattern is None:
        return batch * heads * (Tq * Tk if shift is None else _triangle(Tq + shift, Tk, Tq))
    if shift is not None:
        pattern = patterns.both(pattern, patterns.causal(shift))
    planes = batch if pattern.per_batch else 1, heads if pattern.per_head else 1
    entries = planes[0] * planes[1] * Tq * Tk
    if not entries:
        return 0
    hidden = patterns.sparsity(pattern, Tq, Tk, batch=planes[0], heads=planes[1], device=device)
    # A share in float64 is exact to a part in 2^52, so the rounded product is the count.
    return round((1 - hidden) * entries) * (batch * heads // (planes[0] * planes[1]))


def flops(phase: str, pairs: int, D: int) -> int:
    """Operations of "forward", "backward" (alone) or "both", for so many pairs.

    Raises:
        ValueError: another phase.
    """
    if phase not in PER_PAIR:
        raise ValueError(f"unknown phase {phase!r}; use one of {', '.join(PER_PAIR)}")
    return PER_PAIR[phase] * pairs * D


def _triangle(ends: int, Tk: int, Tq: int) -> int:
    """Σ min(n, Tk) over the Tq numbers n that end with `ends`, without those below 1."""

    def up_to(last):
        corner = max(0, min(last, Tk))
        return corner * (corner + 1) // 2 + max(0, last - corner) * Tk

    return up_to(ends) - up_to(ends - Tq)
