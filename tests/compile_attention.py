"""Compiles the attention kernels for an H200, which needs none; prints what they take, as JSON.

A process of its own: under TRITON_INTERPRET, as the other tests run, nothing is compiled.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blockshock.kernels import flash_backward, flash_forward, flash_split
from blockshock.kernels.flash_plans import MOST, plans

KERNELS = {
    "forward": flash_forward.forward,
    "keys": flash_backward.gradients_of_keys,
    "queries": flash_backward.gradients_of_queries,
}
TILES = {"q": "M", "do": "M", "o": "M", "dq": "M", "k": "N", "v": "N", "dk": "N", "dv": "N"}
POINTERS = ("lse", "parts", "levels", "key_parts", "value_parts")


def compiled(name: str, D: int, keep: str, consecutive: bool):
    """The kernel of one plan for bf16, compiled."""
    listed = keep in ("interval", "bits")
    plan = getattr(plans(D, torch.bfloat16, few=False, listed=listed), name)
    constants = {
        "GROUP": 1,
        "M": plan.M,
        "N": plan.N,
        "D": D,
        "PRECISION": "ieee",
        "STAGES": plan.stages,
        "KEEP": keep,
        "DROP": False,
        "LISTED": listed,
        "CONSECUTIVE": consecutive,
        "OWN_IN_REGISTERS": plan.in_registers,
    }

    def kind(argument):
        if argument in constants:
            return "constexpr"
        if argument in TILES:
            return f"tensordesc<bf16[1, 1, {constants[TILES[argument]]}, {D}]>"
        if argument in ("level", "delta"):
            return f"tensordesc<fp32[1, {plan.M}]>"
        if argument in ("low", "high") and name == "keys" and keep == "interval":
            return f"tensordesc<i32[{plan.M}]>"
        if argument in POINTERS:
            return "*fp32"
        if argument in ("turns", "others", "masks", "low", "high", "bits"):
            return "*i32"
        if argument in ("scale", "scale_2", "factor"):
            return "fp32"
        return "i64" if argument in ("seed", "threshold") else "i32"

    kernel = KERNELS[name]
    signature = {argument: kind(argument) for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": plan.warps}
    )
    return made, plan


def usage(made) -> dict:
    """Registers, bytes of stack, of shared memory; wgmma, and whether each of them waits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        found = [
            subprocess.run([tool(), flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        ]
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", found[0].stdout).groups()
    products, waits = (found[1].stdout.count(word) for word in ("HGMMA", "WARPGROUP.DEPBAR"))
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": made.metadata.shared,
        "products": products,
        "alone": waits >= products,
    }


def merged():
    """The kernel that puts pieces of keys together, compiled for heads of 128."""
    constants = {"M": 64, "WIDTH": 128, "D": 128, "MOST": MOST, "STEP": 16}
    kinds = dict.fromkeys(("pieces", "tiles", "Tq"), "i32") | dict.fromkeys(constants, "constexpr")
    kinds |= {"o": "*bf16", "parts": "*fp32", "levels": "*fp32", "lse": "*fp32"}
    kernel = flash_split.merge_pieces
    signature = {argument: kinds[argument] for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2})


def tool() -> str:
    return triton.knobs.nvidia.cuobjdump.path


if __name__ == "__main__":
    for case in (
        ("forward", 128, "causal", False),
        ("forward", 128, "interval", True),
        ("forward", 128, "bits", False),
        ("forward", 64, "ragged", False),
        ("keys", 128, "causal", False),
        ("keys", 128, "interval", True),
        ("keys", 128, "bits", False),
        ("queries", 128, "causal", False),
        ("queries", 128, "bits", False),
    ):
        made, plan = compiled(*case)
        line = json.dumps({"case": case, "warps": plan.warps, **usage(made)})
        sys.stdout.write(f"{line}\n")
    line = json.dumps({"case": ("merge_pieces",), **usage(merged())})
    sys.stdout.write(f"{line}\n")
