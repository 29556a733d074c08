"""Data-parallel benchmark files, made up: nobody measured anything here."""

import math
import random

from tests.synthetic_results import samples, write

__all__ = ["entry", "everything", "write"]

# What a method adds to the time of a step, as a share of it.
COSTS = {
    "none": 0.0,
    "naive": 0.16,
    "flat": 0.11,
    "bucketed": 0.10,
    "overlapped": 0.03,
    "sharded_optimizer": 0.04,
    "fully_sharded": 0.06,
    "torch_ddp": 0.035,
    "torch_fsdp": 0.065,
}
BUCKETS = ("bucketed", "overlapped", "sharded_optimizer", "torch_ddp")
MODELS = {"124M": (768, 12, 32), "308M": (1024, 20, 16), "772M": (1536, 24, 8)}
ATTENTION = {"sdpa_flash": 1.0, "flash_triton": 0.97, "block_sparse": 0.99}
MATRIX = 7.0e14


def entry(method, model="124M", *, phase="training", bucket=25, part=None, **changes):
    """One element of "benchmarks"; keywords set fields of its case, `part` fields of its info."""
    width, depth, batch = MODELS[model]
    taken = bucket if method in BUCKETS else None
    case = {
        "family": "data_parallel",
        "phase": phase,
        "method": method,
        "width": width,
        "depth": depth,
        "batch": batch,
        "T": 1024,
        "heads": width // 64,
        "vocabulary": 50304,
        "attention": None,
        "model": model,
        "bucket_mib": taken,
        "compute_dtype": None,
        "compiled": True,
        "checkpointed": False,
        "text": "python",
        "steps": 20 if phase == "lm" else None,
        "dtype": "bf16",
        "seed": 0,
        "ranks": 2,
    } | changes
    parameters = 12 * depth * width**2 + 50304 * width
    flops = 6 * parameters + 12 * depth * width * 1024
    tokens = batch * 1024
    alone = flops * tokens / (0.45 * MATRIX) * ATTENTION.get(case["attention"], 1.0)
    slow = 1 + abs(math.log2((taken or 25) / 25)) * 0.01
    seconds = alone * (1 + COSTS[method]) * slow
    label = method + (f"-{taken}MiB" if taken not in (None, 25) else "")
    label += f"-compute={case['compute_dtype']}" if case["compute_dtype"] else ""
    point = f"{width}x{depth}-B{batch}-T1024-bf16"
    point += f"-{case['attention']}" if case["attention"] else ""
    chance = random.Random(label + point + phase)
    share = 0.5 if "sharded" in method or "fsdp" in method else 1.0
    rate = 2 * tokens / seconds
    rates = {
        "tokens_per_s": rate,
        "mfu": flops * tokens / seconds / MATRIX,
        "mfu_datasheet": flops * tokens / seconds / 989e12,
        "limit_fraction": 0.4,
    }
    info = {
        "schema": 1,
        "id": f"data_parallel_{phase}/{label}-{point}",
        "usual": {"bucket_mib": 25 if method in BUCKETS else None},
        "case": case,
        "device": "cuda",
        "timing": {
            "mode": "events",
            "calls_per_sample": 1,
            "l2": "warm",
            "interleaved_with": [name for name in COSTS if name != method],
        },
        "errors": {"gradient": {"relative": 0.01, "dense_relative": 0.01, "ratio": 1.0}},
        "regions": {
            name: {"avg": v, "p50": v, "p95": v, "calls": 1, "bytes": 0}
            for name, v in {"forward": seconds / 3, "sync": 1e-4, "total": seconds}.items()
        },
        "memory": {
            "peak_bytes": int((4 + 12 * share) * parameters + 2e10),
            "weight_bytes": 4 * parameters,
            "optimizer_bytes": None if phase == "gradients" else int(8 * share * parameters),
        },
        "floor": {"seconds": 0.4 * seconds},
        "rates": rates,
        "paths": {"attention": case["attention"] or "flash_triton"},
    }
    if phase == "lm":
        start = 0.02 * (method == "none")
        losses = [10.8 * math.exp(-0.05 * step) + start for step in range(20)]
        info["curves"] = {"loss": losses}
        info["rates"]["loss"] = losses[-1]
    data = samples(seconds, seed=chance.random())
    name = f"bench_{phase}[{label}-{point}]"
    return {
        "name": name,
        "group": phase,
        "stats": {"data": data},
        "extra_info": info | (part or {}),
    }


def everything():
    """Sizes and buckets of two phases, and attention of the language model."""
    entries = [
        entry(method, model, phase=phase, bucket=bucket)
        for phase in ("gradients", "training")
        for model in MODELS
        for method in COSTS
        for bucket in ((5, 25, 100) if method in BUCKETS else (25,))
    ]
    entries.append(entry("fully_sharded", compute_dtype="bf16"))
    entries += [
        entry(method, phase="lm", attention=attention)
        for attention in ATTENTION
        for method in COSTS
    ]
    return entries
