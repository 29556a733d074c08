"""Compiles the block-sparse kernels for an H200, which needs none; prints what they take, as JSON.

A process of its own: under TRITON_INTERPRET, as the other tests run, nothing is compiled.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blockshock.kernels import block_lists_triton, block_plans, block_product_triton
from tests.compile_attention import usage

POINTERS = {"bias": "*bf16", "mask": "*u8"}


def compiled(kernel, constants: dict, tiles: dict, warps: int):
    """A kernel with bf16 operands; tiles: shapes of descriptors, by argument."""

    def kind(argument):
        if argument in constants:
            return "constexpr"
        if argument in tiles:
            dtype = constants.get("OUT", "bf16") if argument == "out" else "bf16"
            return f"tensordesc<{dtype}{list(tiles[argument])}>"
        if argument in (
            "count",
            "parts",
            "group",
            "programs",
            "across",
            "kept",
            "N",
            "B",
            "piece",
            "R",
            "C",
        ):
            return "i32"
        return POINTERS.get(argument, "*i32")

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def product(block: int, plan, *, transposed=False, activation="gelu", keep=False):
    """The kernel of X Wᵀ, or of X W."""
    tile = (plan.step, block) if transposed else (block, plan.step)
    constants = {
        "BLOCK": block,
        "ROWS": plan.rows,
        "STEP": plan.step,
        "STAGES": plan.stages,
        "ITEMS": 16 if plan.each else 1,
        "PIECES": block_plans.halves(plan, block),
        "TRANSPOSED": transposed,
        "ACTIVATION": activation,
        "BIAS": not transposed,
        "KEEP": keep,
    }
    out = (plan.rows // constants["PIECES"], block)
    tiles = {"x": (plan.rows, plan.step), "values": tile, "y": out, "z": out}
    return compiled(block_product_triton.product, constants, tiles, plan.warps)


def gradient(block: int, plan, out: str = "bf16"):
    """The kernel of dW at the kept tiles."""
    constants = {"BLOCK": block, "HEIGHT": plan.rows, "DEPTH": plan.step, "STAGES": plan.stages}
    tiles = {"dy": (plan.step, plan.rows), "x": (plan.step, block), "out": (plan.rows, block)}
    return compiled(block_product_triton.gradient, constants | {"OUT": out}, tiles, plan.warps)


def lists(name: str, warps: int, **sizes: int):
    """A kernel that makes lists."""
    return compiled(getattr(block_lists_triton, name), sizes, {}, warps)


def tell(case: tuple, warps: int, made) -> None:
    """A line of JSON."""
    sys.stdout.write(json.dumps({"case": case, "warps": warps, **usage(made)}) + "\n")


if __name__ == "__main__":
    for block in block_plans.BLOCKS:
        firsts = [next(p for p in block_plans.PRODUCTS[block] if bool(p.each) == b) for b in (0, 1)]
        for plan in block_plans.PRODUCTS[block]:
            # With KEEP a tile is written twice, which takes the most room.
            made = product(block, plan, keep=True)
            tell(("gelu", block, str(plan)), plan.warps, made)
            if plan in firsts:
                made = product(block, plan, activation="relu")
                tell(("product", block, str(plan)), plan.warps, made)
                made = product(block, plan, transposed=True, activation=None)
                tell(("transposed", block, str(plan)), plan.warps, made)
        for plan in block_plans.GRADIENTS[block]:
            for out in ("bf16", "fp32"):
                made = gradient(block, plan, out)
                tell(("gradient", block, str(plan), out), plan.warps, made)
    for tall, wide in ((128, 32), (128, 128), (256, 64)):
        warps = tall * wide // 512
        made = lists("_count_and_fill", warps, TALL=tall, WIDE=wide)
        tell(("_count_and_fill", tall, wide), warps, made)
    for name in ("_count", "_fill"):
        tell((name, 256), 4, lists(name, 4, WIDE=256))
