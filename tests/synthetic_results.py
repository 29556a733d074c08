"""Benchmark files of schema 1, made up: nobody measured anything here.

The times follow a simple model of two GPUs (products, an all-reduce, a compress), so that plots and
reports look like real ones; a test that needs a certain outcome sets the times itself.
"""

import json
import math
import random

METHODS = (
    "dense_single",
    "dense_tp_row",
    "dense_tp_column",
    "masked_split",
    "block_shock",
    "block_shock_folded",
)
MASKS = {"masked_split": "tile", "block_shock": "tile", "block_shock_folded": "1100"}
# What a method uses when nothing is asked; None where it has none.
USUAL_REDUCE = {"dense_tp_row": "collective", "dense_tp_column": "collective"} | dict.fromkeys(
    ("masked_split", "block_shock", "block_shock_folded"), "auto"
)
USUAL_KERNEL = {"block_shock": "auto"}
# About as many lines as a panel ever has.
VARIANTS = (
    *((method, {}) for method in METHODS),
    ("dense_tp_row", {"reduce": "auto"}),
    ("dense_tp_row", {"reduce": "exchange"}),
    ("block_shock", {"mask": "1100"}),
    ("block_shock", {"mask": "tile_magnitude"}),
    ("block_shock", {"kernel": "cusparselt"}),
    ("block_shock", {"reduce": "collective"}),
)
REDUCE = {"collective": 1.0, "auto": 0.55, "two_shot": 0.7, "exchange": 0.62}
# Times of the local product over those of half the dense product.
PRODUCT = {
    "dense_single": 2.0,
    "dense_tp_row": 1.0,
    "dense_tp_column": 1.02,
    "masked_split": 2.0,
    "block_shock": 1.25,
    "block_shock_folded": 1.03,
}
KEPT = {"dense_single": 2.0, "masked_split": 2.0, "block_shock": 1.125}
POLICIES = {
    "dense_single": ("frozen", "plain"),
    "dense_tp_row": ("frozen", "plain"),
    "dense_tp_column": ("frozen", "plain"),
    "masked_split": ("frozen", "plain"),
    "block_shock": ("frozen", "dense_master", "packed_master", "float32_master"),
    "block_shock_folded": ("frozen", "packed_master"),
}


def samples(median, *, rounds=30, noise=0.005, seed=0):
    """Times around `median` with relative noise; their median is `median` to the last digits."""
    chance = random.Random(seed)
    data = [median * math.exp(noise * chance.gauss(0, 1)) for _ in range(rounds)]
    middle = sorted(data)[rounds // 2]
    if rounds % 2 == 0:
        middle = (middle + sorted(data)[rounds // 2 - 1]) / 2
    return [value * median / middle for value in data]


def half_product(n, b):
    """Seconds of the dense product with half of K on one GPU: reading weights, or multiplying."""
    return max(n * n / 4.3e12, b * n * n / 640e12) + 3e-6


def reduce_time(n, b):
    """Seconds of the sum over two ranks of a [b, n] tensor of 16 bits."""
    return 8e-6 + 2 * b * n / 290e9


def usual(method):
    """What the method uses when nothing is asked, as a run writes it."""
    return {
        "mask": MASKS.get(method),
        "kernel": USUAL_KERNEL.get(method),
        "reduce": USUAL_REDUCE.get(method),
    }


def run_label(case):
    """The name in `interleaved_with`, as a run writes it."""
    method, known = case["method"], usual(case["method"])
    parts = [method, case["mask"] if case["mask"] != known["mask"] else None, case["policy"]]
    parts.append(case["kernel"] if case["kernel"] != known["kernel"] else None)
    parts.append(f"reduce={case['reduce']}" if case["reduce"] != known["reduce"] else None)
    return "-".join(part for part in parts if part)


def entry(method, n, b, *, phase="forward", seconds=None, data=None, **changes):
    """One element of "benchmarks"; keywords set fields of its case, or the whole `data`."""
    part, chance = changes.pop("part", {}), random.Random(f"{method}{n}{b}{phase}{changes}")
    case = {
        "family": "linear",
        "phase": phase,
        "method": method,
        "N": n,
        "K": n,
        "B": b,
        "dtype": "bf16",
        **usual(method),
        "policy": None,
        "optimizer": None,
        "bias": True,
        "input": "gaussian",
        "loss": "mse_target",
        "weight": None,
        "ranks": 2,
        "steps": None,
        "seed": 0,
    } | changes
    regions, total = model(method, n, b, case)
    total = seconds or total
    data = data or samples(total, seed=chance.random())
    name = "-".join([run_label(case), f"N{n}", f"B{b}", case["dtype"]])
    name += f"-{case['optimizer']}" if case["optimizer"] else ""
    weight = int(n * n * KEPT.get(method, 1.0))
    dense_error = 0.0017
    relative = dense_error * (1.0 if method == "dense_single" else 1.42)
    figures = {
        "relative": relative,
        "max": relative * 11,
        "mean": relative * 0.8,
        "max_relative": relative * 6,
        "dense_relative": dense_error,
        "ratio": relative / dense_error,
        "limit": 1.5,
    }
    floor = {
        "compute": b * n * n / 700e12,
        "memory": n * n * KEPT.get(method, 1.0) / 4.3e12,
        "wire": 0.0 if method == "dense_single" else b * n * 2 / 380e9,
    }
    floor["seconds"] = max(floor.values())
    info = {
        "schema": 1,
        "usual_mask": MASKS.get(method),
        "usual": usual(method),
        "id": f"{phase}/{name}",
        "case": case,
        "device": "cuda",
        "timing": {
            "mode": "graph",
            "calls_per_sample": 8,
            "l2": "warm",
            "interleaved_with": [
                run_label(case | {"method": m, "policy": p} | usual(m) | changed)
                for m, changed in VARIANTS
                for p in (POLICIES[m] if case["policy"] else [None])
            ],
        },
        "regions": {
            region: {"avg": v, "p50": v * 0.995, "p95": v * 1.04, "calls": 1, "bytes": 2 * n * b}
            for region, v in regions.items()
        },
        "errors": {"output": figures},
        "memory": {
            "peak_bytes": weight + 3 * n * b * 2 + 2**25,
            "weight_bytes": weight,
            "weight_bytes_estimated": int(weight * 0.99),
        },
        "rates": {
            "tokens_per_s": b / total,
            "dense_tflops": 2 * b * n * n / total / 1e12,
            "limit_fraction": floor["seconds"] / total,
        },
        "floor": floor,
        "paths": {"forward": "cuSPARSELt, algorithm 17" if "shock" in method else "cuBLAS"},
        "clocks": None,
    }
    if phase in ("correctness", "backward", "training"):
        info["errors"]["grad_input"] = {k: v * 1.1 for k, v in figures.items()} | {"limit": 1.5}
    if phase in ("correctness", "training"):
        info["errors"]["grad_weight"] = {k: v * 1.05 for k, v in figures.items()} | {"limit": 1.5}
    if phase == "drift":
        steps = range(1, case["steps"] + 1)
        info["drift"] = {
            "method": [relative * math.sqrt(step) * (1 + 0.02 * chance.random()) for step in steps],
            "dense": [dense_error * math.sqrt(step) for step in steps],
        }
    info |= part
    stats = {"data": data, "median": sorted(data)[len(data) // 2], "rounds": len(data)}
    return {"name": f"bench_{phase}[{name}]", "group": phase, "stats": stats, "extra_info": info}


def model(method, n, b, case):
    """Regions of one sample, and its seconds."""
    product = half_product(n, b) * PRODUCT.get(method, 1.0)
    # A 2:4 product of few rows is bound by a kernel that reads weights slowly.
    if method == "block_shock" and b <= 64:
        product *= 2.2 if case["kernel"] == "cusparselt" else 0.7
    if method == "block_shock":
        product *= {"1100": 0.94, "tile_magnitude": 1.02}.get(case["mask"], 1.0)
    reduce = 0.0 if method == "dense_single" else reduce_time(n, b)
    reduce *= REDUCE.get(case["reduce"], 1.0)
    layout = reduce * 0.3 if method == "dense_tp_column" else 0.0
    forward = product + reduce + layout
    regions = {"forward": forward}
    phase = case["phase"]
    if phase in ("backward", "training", "correctness"):
        regions["backward"] = forward * (1.0 if phase == "backward" else 1.9)
    if reduce:
        regions["allgather" if method == "dense_tp_column" else "allreduce"] = reduce * (
            2 if "backward" in regions else 1
        )
    if layout:
        regions["layout_fix"] = layout
    if phase == "training" and case["policy"] != "frozen":
        half = n * n * KEPT.get(method, 1.0) / 2
        states = {"sgd": 3, "momentum": 5, "adam": 7}.get(case["optimizer"], 3)
        regions["optimizer"] = half * 2 * states / 3.5e12
        if case["policy"] == "dense_master":
            regions["optimizer"] *= 2
            regions["compress"] = 6.0e-3 * (n / 16384) ** 2
        elif case["policy"] in ("packed_master", "float32_master"):
            regions["compress"] = 0.31e-3 * (n / 16384) ** 2
    if phase == "drift":
        total = forward * case["steps"]
    else:
        total = sum(
            regions.get(name, 0.0) for name in ("forward", "backward", "compress", "optimizer")
        )
    regions["total"] = total
    return regions, total


def machine(kind="cuda", device="2x NVIDIA H200", ranks=2):
    """machine_info["blockshock"]."""
    if kind == "cpu":
        device = "CPU (2 gloo ranks)"
    return {
        "device": device,
        "kind": kind,
        "ranks": ranks,
        "backend": "nccl" if kind == "cuda" else "gloo",
        "torch": "2.11.0",
        "cuda": "13.0" if kind == "cuda" else None,
        "nccl": "2.28.9" if kind == "cuda" else None,
        "cusparselt": "0.8.0" if kind == "cuda" else None,
        "triton": "3.6.0",
        "driver": "580.95.05" if kind == "cuda" else None,
        "cpu": "A processor",
        "topology": [["X", "NV18"], ["NV18", "X"]],
        "power_limit_w": [700, 700],
        "ceilings": {
            "matrix_flops": {"bf16": 6.6e14},
            "copy_bytes_per_s": 4.3e12,
            "link_bytes_per_s": 3.8e11,
        },
        "version": "0.1.0",
    }


def document(entries, **machine_options):
    """The whole file as pytest-benchmark would write it."""
    return {
        "machine_info": {"node": "host", "blockshock": machine(**machine_options)},
        "commit_info": {"id": "0" * 40, "dirty": False},
        "benchmarks": entries,
        "datetime": "2026-01-01T00:00:00+00:00",
        "version": "5.3.1",
    }


def write(path, entries, **machine_options):
    """Writes the file and gives its path as a string."""
    path.write_text(json.dumps(document(entries, **machine_options)), encoding="utf-8")
    return str(path)


def everything(
    sizes=(4096, 8192, 16384),
    batches=(64, 1024, 4096),
    dtypes=("bf16",),
    optimizers=("sgd", "adam"),
    policies=None,
    variants=tuple((method, {}) for method in METHODS),
):
    """All variants and phases over a grid of sizes; training with these optimizers and policies."""
    entries = []
    for n in sizes:
        for b in batches:
            for dtype in dtypes:
                for method, changed in variants:
                    more = {"dtype": dtype, **changed}
                    entries += [
                        entry(method, n, b, phase=phase, **more)
                        for phase in ("correctness", "forward", "backward")
                    ]
                    entries += [
                        entry(method, n, b, phase="training", policy=policy, optimizer=o, **more)
                        for o in optimizers
                        for policy in POLICIES[method]
                        if policies is None or policy in policies
                    ]
                    if b == batches[0]:
                        entries.append(entry(method, n, b, phase="drift", steps=20, **more))
    return entries
