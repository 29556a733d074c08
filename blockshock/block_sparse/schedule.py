"""Sparsity that grows with the steps, fast at first and slowly at the end.

    s(t) = final + (initial − final) (1 − (t − begin) / (end − begin))³     begin <= t <= end
    s(t) = initial before it, final after it

Zhu and Gupta, arXiv:1710.01878, equation 1. It is a function of the step, so there is no state.
"""

from blockshock.block_sparse import tiles


def cubic(step: int, *, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    """The sparsity of a step. begin, end: the first step that may prune, and the first at `final`.

    With begin = end the sparsity jumps there.

    Raises:
        ValueError: end before begin, or a sparsity outside [0, 1).
    """
    if end < begin:
        raise ValueError(f"end = {end} is before begin = {begin}; let the schedule end later")
    tiles.check_sparsity(initial)
    tiles.check_sparsity(final)
    if step >= end:
        return final
    if step <= begin:
        return initial
    left = 1 - (step - begin) / (end - begin)
    return final + (initial - final) * left**3
