"""Files of the training study, of decoding and of training steps, made up: nobody measured them."""

import math
import random

from tests.synthetic_results import samples, write

__all__ = ["everything", "study", "timed", "write"]

# Rule of a plan -> syncs a block.
PLANS = {"tp": 2, "spd": 1, "spd_mixed": 0.75, "spd_2": 1 / 2, "spd_3": 1 / 3, "spd_4": 1 / 4}
PLANS |= {"spd_6": 1 / 6, "desync": 1, "parallel": 1}
# What a plan adds to the last loss, as a share of it.
WORSE = {"tp": 0.0, "spd": 0.004, "spd_mixed": 0.006, "spd_2": 0.013, "spd_3": 0.024}
WORSE |= {"spd_4": 0.035, "spd_6": 0.06, "desync": 0.005, "parallel": 0.009}
MODELS = {"124M": (768, 12), "1.3B": (2048, 24)}
SUM_SECONDS = {"collective": 14e-6, "exchange": 6e-6, "two_shot": 9e-6}
LOGGED = range(50, 1001, 50)


def _case(phase, method, model, **changes):
    width, depth = MODELS[model]
    return {
        "family": "transformer",
        "phase": phase,
        "method": method,
        "width": width,
        "depth": depth,
        "heads": width // 64,
        "vocabulary": 50304,
        "model": model,
        "batch": 1,
        "T": 1024,
        "reduce": "collective",
        "dtype": "bf16",
        "compiled": True,
        "checkpointed": False,
        "vocabulary_parallel": False,
        "attention": None,
        "seed": 0,
        "ranks": 2,
    } | changes


def _entry(case, seconds, info, label, point):
    phase = case["phase"]
    chance = random.Random(label + point + phase)
    neighbours = [m if s == "collective" else f"{m}-{s}" for m in PLANS for s in SUM_SECONDS]
    common = {
        "schema": 1,
        "id": f"transformer_{phase}/{label}-{point}",
        "usual": {"reduce": "collective"},
        "case": case,
        "device": "cuda",
        "timing": {"mode": "graph", "l2": "warm", "interleaved_with": neighbours},
    }
    return {
        "name": f"bench_{phase}[{label}-{point}]",
        "group": phase,
        "stats": {"data": samples(seconds, seed=chance.random())},
        "extra_info": common | info,
    }


def timed(phase, method, model="124M", *, syncs=None, **changes):
    """A case of decoding or of a training step; `changes` set fields of its case."""
    case = _case(phase, method, model, **changes)
    width, depth = MODELS[model]
    syncs = round(PLANS[method] * depth) if syncs is None else syncs
    weights = (12 * depth * width**2 / 2 + 50304 * width) * 2
    floor = weights / 3.2e12
    local = 1.3 * floor if phase == "decode" else 9e-3 * depth / 12 * (width / 768) ** 2
    sums = syncs * SUM_SECONDS[case["reduce"]] * (1 if phase == "decode" else 30)
    local += 2e-7 * case["batch"]
    total = local + sums
    label = method + (f"-{case['reduce']}" if case["reduce"] != "collective" else "")
    tokens = case["batch"] * (1 if phase == "decode" else case["T"])
    info = {
        "errors": {"output": {"relative": 0.01, "dense_relative": 0.01, "ratio": 1.0}},
        "regions": {
            name: {"avg": v, "p50": v, "p95": v, "calls": 1, "bytes": 0}
            for name, v in (("allreduce", sums), ("total", total))
        },
        "memory": {"peak_bytes": 2**33},
        "floor": {"seconds": floor},
        "rates": {"syncs": syncs, "tokens_per_s": tokens / total, "limit_fraction": floor / total},
    }
    return _entry(case, total, info, label, f"{width}x{depth}-B{case['batch']}-T{case['T']}-bf16")


def study(method, *, seed=0, model="124M", last=3.0, steps=1000, recipe="0a1b2c3d", **changes):
    """A finished training run; last: the last loss of the baseline."""
    more = {"batch": 128, "steps": steps, "recipe": recipe, "tensor_ranks": 2, "seed": seed}
    case = _case("study", method, model, **more, **changes) | {"model": None}
    _, depth = MODELS[model]
    syncs = round(PLANS[method] * depth)
    seconds = 0.4 + 0.01 * syncs
    shift = random.Random(seed).gauss(0, 0.002)
    logged = [step for step in LOGGED if step <= steps]
    end = last * (1 + WORSE[method]) * (1 + shift)
    losses = [end * (1 + 1.5 * math.exp(-step / 120) - 1.5 * math.exp(-steps / 120))
              for step in logged]  # fmt: skip
    info = {
        "curves": {"step": logged, "loss": losses, "val_step": logged, "val_loss": losses},
        "rates": {
            "syncs": syncs,
            "tokens_per_s": 128 * 1024 / seconds,
            "loss": losses[-1],
            "val_loss": losses[-1],
        },
        "timing": {"mode": "training log"},
    }
    return _entry(case, seconds, info, method, f"{case['width']}-{steps}-{recipe}-{seed}")


def block(phase, method, T, *, pattern=None, window=1024, reduce="collective", batch=1):
    """A case of the hybrid block, 4096 wide. window: keys that a query sees of a pattern."""
    case = _case(phase, method, "124M", T=T, reduce=reduce, batch=batch, pattern=pattern)
    case |= {"width": 4096, "depth": 1, "heads": 32, "model": None, "compiled": False}
    passes = 3.5 if phase == "hybrid_backward" else 1
    seen = T / 2 if pattern is None else min(T / 2, window)
    seconds = passes * T * (seen * 4 * 2048 + 12 * 4096**2 / 2) / 4e14
    sums = passes * T * 4096 * 4 / 3e11
    floor = 0.6 * seconds
    info = {
        "errors": {"output": {"relative": 0.01, "dense_relative": 0.01, "ratio": 1.0}},
        "regions": {
            name: {"avg": v, "p50": v, "p95": v, "calls": 1, "bytes": 0}
            for name, v in (("allreduce", sums), ("total", seconds + sums))
        },
        "floor": {"seconds": floor},
        "rates": {"tokens_per_s": T / (seconds + sums), "sparsity": 1 - seen / T},
        "timing": {"mode": "events", "l2": "warm",
                   "interleaved_with": ["dense_attention", "sparse_attention-band(1024)"]},
    }  # fmt: skip
    label = "-".join(part for part in (method, pattern) if part)
    return _entry(case, seconds + sums, info, label, f"4096x1-H32-B{batch}-T{T}-bf16")


def everything():
    """Both models and batches with each sum, and the study with one seed and, shorter, three."""
    entries = [
        timed("decode", method, model, batch=batch, reduce=reduce)
        for model in MODELS
        for batch in (1, 16)
        for method in PLANS
        for reduce in SUM_SECONDS
    ]
    entries += [timed("sync", method, model, batch=16) for model in MODELS for method in PLANS]
    entries += [study(method) for method in PLANS]
    entries += [
        block(phase, method, T, pattern=pattern)
        for phase in ("hybrid_forward", "hybrid_backward")
        for method, pattern in (("dense_attention", None), ("sparse_attention", "band(1024)"))
        for T in (4096, 8192, 16384, 32768)
    ]
    entries += [
        block(phase, "sparse_attention", 32768, pattern="band(256)", window=256)
        for phase in ("hybrid_forward", "hybrid_backward")
    ]
    entries += [
        study(method, seed=seed, last=3.6, steps=300, recipe="4e5f6071")
        for method in ("tp", "spd_2")
        for seed in (0, 1, 2)
    ]
    return entries
