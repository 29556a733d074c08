"""Which plan a block-sparse kernel takes: the fastest that was measured, or else the rule.

    python -m blockshock.tune block_sparse    measures; kept on disk, as `tuning` says
    plans.json                                what is shipped, by GPU: {question: answer}

Nothing is measured while a layer runs, and no other rank is asked: a plan changes no result beyond
its rounding, so ranks may have different ones. Answers are for N, K, block, B (with other rows of
its class, `tuning.sizes`), dtype, and the share of tiles kept to the nearest twentieth.
"""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from blockshock import tuning
from blockshock.kernels import block_plans, block_product
from blockshock.kernels.block_lists import Lists
from blockshock.kernels.block_plans import Plan

SHIPPED = Path(__file__).with_name("plans.json")
SIDES = ("Y", "dX", "dW")
_chosen: dict[str, Plan] = {}


def candidates(side: str, block: int, B: int) -> dict[str, Plan]:
    """By name, the first by rule; B: rows of X."""
    found = block_plans.GRADIENTS[block] if side == "dW" else block_plans.products(block, B)
    return {str(plan): plan for plan in found}


def chosen(side: str, shape: tuple[int, int], lists: Lists, block: int, x: Tensor) -> Plan:
    """The plan for one side of a product with W [N, K]; x: B rows of the products' dtype."""
    asked = question(side, shape, lists, block, x)
    plan = _chosen.get(asked)
    if plan is None:
        known, answer = candidates(side, block, len(x)), None
        if x.is_cuda and len(x):
            answer = tuning.recall(asked, list(known), shipped(x.device))
        plan = known[answer.name] if answer else next(iter(known.values()))
        tuning.hold(_chosen, asked, plan)
    return plan


def question(side: str, shape: tuple[int, int], lists: Lists, block: int, x: Tensor) -> str:
    """What a plan is measured for."""
    share = round(20 * lists.kept / (lists.grid[0] * lists.grid[1])) / 20
    where = "" if x.is_cuda else ", no GPU"
    return (
        f"block_sparse {side}: N={shape[0]} K={shape[1]} block={block} kept={share:.2f} "
        f"B={len(x)} {str(x.dtype).removeprefix('torch.')}{where}"
    )


def measure(
    shape: tuple[int, int], lists: Lists, block: int, x: Tensor
) -> dict[str, tuning.Answer]:
    """Measures the plans of all sides, with values and dZ at random; by question."""
    N, K = shape
    values = torch.randn(lists.kept, block, block, dtype=x.dtype, device=x.device)
    dz = torch.randn(len(x), N, dtype=x.dtype, device=x.device)

    def step(side: str, plan: Plan):
        if side == "Y":
            return lambda: block_product.product(x, values, lists, N, plan=plan)
        if side == "dX":
            return lambda: block_product.product(dz, values, lists, K, transposed=True, plan=plan)
        return lambda: block_product.gradient(dz, x, lists, block, plan=plan)

    found = {}
    for side in SIDES:
        asked = question(side, shape, lists, block, x)
        steps = {name: step(side, p) for name, p in candidates(side, block, len(x)).items()}
        found[asked] = tuning.pick(asked, {"plans": steps}, x.device)
    _chosen.clear()
    return found


def ship(answers: dict[str, tuning.Answer], device: torch.device, file: Path = SHIPPED) -> None:
    """Adds answers to a table that is shipped."""
    table = json.loads(file.read_text())
    of_device = table.setdefault(torch.cuda.get_device_name(device), {})
    of_device |= {asked: tuning.entry(answer) for asked, answer in answers.items()}
    file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    shipped.cache_clear()


@cache
def shipped(device: torch.device) -> dict:
    """The table of a GPU."""
    return json.loads(SHIPPED.read_text()).get(torch.cuda.get_device_name(device), {})
