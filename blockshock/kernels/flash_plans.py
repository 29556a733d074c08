"""Which tiles the attention kernels work in, by times on an H200."""

from dataclasses import dataclass
from functools import cache

import torch

PROCESSORS = 132  # of an H200, and of an H100
LEAST, MOST = 256, 128  # keys of a piece; pieces


@dataclass(frozen=True)
class Plan:
    """M queries × N keys a tile; warps of a program; stages of the pipeline that loads tiles."""

    M: int
    N: int
    warps: int
    stages: int
    in_registers: bool = False  # a program's own operands of the products, not in shared memory


@dataclass(frozen=True)
class Plans:
    """Of the forward, of dK and dV, and of dQ."""

    forward: Plan
    keys: Plan
    queries: Plan


@cache
def plans(D: int, dtype: torch.dtype, *, few: bool, listed: bool) -> Plans:
    """The tiles for heads of D (`padded`). few: programs of 64 queries would leave processors idle.

    listed: of a block table, which serves all three kernels with one M and N. Chosen among 3 to 6
    each by times on one H200: bf16, D = 64 and 128, 16 heads of 16384 tokens (some also at 4096),
    full, causal, in bands, random blocks, strides and with global tokens; D = 256 at 4096 tokens;
    fp32 without lists at 2048 tokens, D = 128. The same tiles won at both lengths, full and causal.
    Where one tile serves all kernels, or two were alike, it is not the fastest for each. fp32 with
    lists or D = 256 was not timed.
    """
    if dtype == torch.float32:  # products in float32 proper
        tile = Plan(16, 32, 4, 1) if D > 128 else Plan(32, 32, 4, 2)
        if listed or few or D > 128:
            return Plans(tile, tile, tile)
        return Plans(Plan(64, 32, 4, 1), tile, Plan(64, 64, 8, 1))
    if D > 128:
        return Plans(
            Plan(64, 32, 4, 2),
            Plan(64, 32, 8, 1) if listed else Plan(32, 64, 8, 1),
            Plan(64, 32, 4, 2),
        )
    if few:
        tile = Plan(32, 32, 4, 2)
        return Plans(tile, tile, tile)
    if listed:
        stages = (3, 2, 2) if D > 64 else (2, 2, 2)
        return Plans(*(Plan(64, 64, 4, number) for number in stages))
    if D > 64:
        return Plans(Plan(64, 64, 4, 3, True), Plan(64, 64, 4, 2), Plan(128, 64, 8, 3, True))
    return Plans(Plan(64, 128, 4, 2), Plan(64, 64, 4, 2), Plan(128, 64, 4, 3))


def chosen(q_shape: tuple[int, int, int, int], dtype: torch.dtype, *, listed: bool) -> Plans:
    """The plans for q [B, H, Tq, D]; listed as in `plans`."""
    B, H, Tq, D = q_shape
    few = B * H * -(-Tq // 64) < PROCESSORS
    return plans(padded(D), dtype, few=few, listed=listed)


def split(q_shape: tuple[int, int, int, int], dtype: torch.dtype, Tk: int) -> tuple[Plan, int]:
    """The forward's plan without lists, and into how many pieces the keys of each tile are split.

    Few queries over many keys give too few programs. Two programs of a plan fit a processor, so
    time is counted in waves of as many, each 1 / pieces long; the fewest pieces within 10% of the
    shortest time are taken (like the rule of FlashAttention's num_splits_heuristic). Each has LEAST
    keys or more, and lengths near the square keep the plans that were timed for them.
    """
    B, H, Tq, D = q_shape
    plan = plans(padded(D), dtype, few=False, listed=False).forward
    programs, most = B * H * -(-Tq // plan.M), min(Tk // LEAST, MOST)
    if most < 2 or Tk < 8 * Tq or programs >= 0.8 * 2 * PROCESSORS:
        return chosen(q_shape, dtype, listed=False).forward, 1
    times = [-(-programs * n // (2 * PROCESSORS)) / n for n in range(1, most + 1)]
    return plan, 1 + next(n for n, time in enumerate(times) if time <= 1.1 * min(times))


def padded(D: int) -> int:
    """The size of a head as the kernels have it: a power of two, 16 at least."""
    return max(16, 1 << (D - 1).bit_length())
