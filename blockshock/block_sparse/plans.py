"""Which plan a block-sparse kernel takes: the fastest that was measured, or else the rule.

    python -m blockshock.tune block_sparse ...     measures; kept on disk, as `tuning` says
    plans.json                                     what is shipped, by GPU

Nothing is measured while a layer runs, and no other rank is asked: a plan changes no result beyond
its rounding, so ranks may have different ones.
"""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from blockshock import tuning
from blockshock.kernels import block_plans
from blockshock.kernels.block_lists import Lists
from blockshock.kernels.block_plans import Plan

SHIPPED = Path(__file__).with_name("plans.json")
SIDES = ("Y", "dX", "dW")
_chosen: dict[tuple, Plan] = {}


def candidates(side: str, block: int, B: int) -> dict[str, Plan]:
    """By name, the first by rule; B: rows of X."""
    found = block_plans.gradients(block) if side == "dW" else block_plans.products(block, B)
    return {str(plan): plan for plan in found}


def chosen(side: str, shape: tuple[int, int], lists: Lists, block: int, x: Tensor) -> Plan:
    """The plan for one side of a product with W of this shape; x: B rows of the products' dtype."""
    rate = lists.kept / (lists.grid[0] * lists.grid[1])
    key = (side, *shape, block, round(rate, 2), len(x), x.dtype, x.device)
    plan = _chosen.get(key)
    if plan is None:
        known = candidates(side, block, len(x))
        answer = None
        if x.is_cuda and len(x):
            asked = question(side, shape, lists, block, x)
            answer = tuning.recall(asked, list(known), shipped=_shipped(x.device))
        plan = known[answer.name] if answer else next(iter(known.values()))
        tuning.hold(_chosen, key, plan)
    return plan


def question(side: str, shape: tuple[int, int], lists: Lists, block: int, x: Tensor) -> str:
    """What a plan is measured for."""
    rate = lists.kept / (lists.grid[0] * lists.grid[1])
    return (
        f"block_sparse {side}: N={shape[0]} K={shape[1]} block={block} kept={rate:.2f} "
        f"B={len(x)} {str(x.dtype).removeprefix('torch.')}"
    )


@cache
def _shipped(device: torch.device) -> dict:
    return json.loads(SHIPPED.read_text()).get(torch.cuda.get_device_name(device), {})
