"""Attention results of schema 1, made up: nobody measured anything here.

The times follow a simple model of one GPU (arithmetic at a rate of the method, a launch, and for
block lists the tiles that are touched), so that plots and reports look like real ones.
"""

import random

from tests.synthetic_results import document, samples, write

__all__ = ["RATES", "document", "entry", "everything", "patterns", "read_write", "sweep", "write"]

# Forward rates at D = 128 in TFLOP/s; the backward runs at BACKWARD of it.
RATES = {
    "reference": 35.0,
    "sdpa_flash": 355.0,
    "sdpa_cudnn": 650.0,
    "flex": 480.0,
    "flash_torch": 6.0,
    "flash_triton": 470.0,
    "block_sparse": 430.0,
    "block_sparse_unpruned": 430.0,
}
BACKWARD = 0.75
MATRIX, COPY = 660.0, 4.3e12
DENSE = tuple(method for method in RATES if not method.startswith("block_sparse"))
SPARSE = ("flex", "block_sparse", "block_sparse_unpruned")
# Name: share of pairs that do not attend, and of tiles that are not touched, at T = 4096.
PATTERNS = {
    "band(256)": (0.877, 0.848),
    "strided(64)": (0.955, 0.62),
    "global_band(64, 256)": (0.85, 0.81),
    "random_blocks(64, 0.1)": (0.90, 0.82),
    "documents(8 of 512)": (0.875, 0.875),
    "causal_band(64)": (0.984, 0.953),
}
# Of the random blocks that are drawn at T = 16384 alone, beside the share above.
SHARES = (0.5, 0.25, 0.15, 0.05, 0.02)
# tier: (batch, T) or (batch, Tq, Tk)
SIZES = (
    ("small", 16, 512, 512),
    ("medium", 8, 2048, 2048),
    ("large", 4, 4096, 4096),
    ("XXL", 1, 16384, 16384),
    ("long", 1, 65536, 65536),
    ("rectangular", 2, 512, 4096),
    ("rectangular", 2, 4096, 512),
    ("rectangular", 2, 512, 16384),
    ("rectangular", 2, 16384, 512),
    ("rectangular", 2, 4096, 16384),
    ("rectangular", 2, 16384, 4096),
)


def entry(method, Tq, Tk=None, D=128, *, phase="forward", seconds=None, data=None, **changes):
    """One element of "benchmarks"; keywords set fields of its case, `part` fields of its info."""
    part, hidden = changes.pop("part", {}), changes.pop("hidden", None)
    Tk = Tk or Tq
    case = {
        "family": "attention",
        "phase": phase,
        "method": method,
        "batch": 1,
        "heads": 16,
        "kv_heads": 16,
        "Tq": Tq,
        "Tk": Tk,
        "D": D,
        "dtype": "bf16",
        "causal": False,
        "pattern": None,
        "tier": None,
        "seed": 0,
        "ranks": 1,
    } | changes
    batch, heads, dense = case["batch"], case["heads"], case["pattern"] is None
    sparsity, touched = hidden or PATTERNS.get(case["pattern"], (0.0, 0.0))
    share = _seen(Tq, Tk) if case["causal"] and dense else 1 - sparsity
    flops = {"forward": 4, "forward_backward": 14}[phase] * share * batch * heads * Tq * Tk * D
    # A list of blocks computes the tiles that it touches, and FlexAttention skips worse.
    done = {"block_sparse": 1 - touched, "block_sparse_unpruned": 1.0}.get(method, share)
    rate = RATES.get(method, 100.0) * 1e12 * (0.75 if D < 128 else 1.0)
    whole = batch * heads * Tq * Tk * D / (rate * (1.0 if min(Tq, Tk) > 1024 else 0.6))
    if case["pattern"] and method == "flex":
        done *= 1.35
    forward, backward = 4 * whole * done + 6e-6, 10 * whole * done / BACKWARD + 9e-6
    total = seconds or (forward if phase == "forward" else forward + backward)
    tokens = f"T{Tq}" + (f"x{Tk}" if Tk != Tq else "")
    label = "-".join([method, f"B{batch}", f"H{heads}", tokens, f"D{D}", case["dtype"]])
    label += ("-causal" if case["causal"] else "") + (f"-{case['pattern']}" if not dense else "")
    chance = random.Random(label + phase)
    data = data or samples(total, seed=chance.random())
    size = 2 * batch * heads * D
    inputs, extra = size * (Tq + 2 * Tk), batch * heads * Tq * 4
    floor = {"compute": flops / MATRIX / 1e12, "memory": (inputs + size * Tq) / COPY, "wire": 0.0}
    floor["seconds"] = max(floor.values())
    regions = {"forward": forward, "total": total}
    regions |= {"backward": backward} if phase != "forward" else {}
    tensors = ["output"] + (["grad_q", "grad_k", "grad_v"] if phase != "forward" else [])
    info = {
        "schema": 1,
        "id": f"attention_{phase}/{label}",
        "usual": {},
        "case": case,
        "device": "cuda",
        "timing": {
            "mode": "graph",
            "calls_per_sample": 4,
            "l2": "warm",
            "interleaved_with": list(RATES),
        },
        "errors": {tensor: _errors(chance) for tensor in tensors},
        "truth": "float64",
        "regions": {
            name: {"avg": v, "p50": v * 0.995, "p95": v * 1.04, "calls": 1, "bytes": 0}
            for name, v in regions.items()
        },
        "memory": {
            "peak_bytes": inputs * (2 if phase != "forward" else 1)
            + size * Tq
            + extra
            # The reference holds all scores.
            + (batch * heads * Tq * Tk * 6 if method in ("reference", "flash_torch") else 0),
            "input_bytes": inputs,
        },
        "floor": floor,
        "rates": {
            "tokens_per_s": batch * Tq / total,
            "tflops": flops / total / 1e12,
            "matrix_fraction": flops / total / 1e12 / MATRIX,
            "limit_fraction": floor["seconds"] / total,
        },
        "paths": {"forward": f"{method} kernel"},
        "pattern": None if dense else _pattern(case, method, sparsity, touched),
        "clocks": None,
    } | part
    stats = {"data": data, "median": sorted(data)[len(data) // 2], "rounds": len(data)}
    name = f"bench_attention_{phase}[{label}]"
    return {"name": name, "group": phase, "stats": stats, "extra_info": info}


def sweep(phases=("forward", "forward_backward"), sizes=SIZES, dims=(64, 128), methods=DENSE):
    """Dense attention, full and causal, over the tiers; slow methods at small sizes only."""
    return [
        entry(method, Tq, Tk, D, phase=phase, causal=causal, batch=batch, tier=tier)
        for phase in phases
        for tier, batch, Tq, Tk in sizes
        for D in dims
        for causal in (False, True)
        for method in methods
        if Tq * Tk <= 4096**2 or method not in ("reference", "flash_torch")
    ]


def patterns(phases=("forward", "forward_backward"), lengths=(4096, 16384), D=128):
    """Every pattern at these lengths, and the dense kernels there; longer is sparser."""
    entries = []
    for phase in phases:
        for T in lengths:
            entries += [entry(m, T, D=D, phase=phase, tier="patterns") for m in DENSE[1:4]]
            entries.append(entry("flash_triton", T, D=D, phase=phase, tier="patterns"))
            for name, (sparsity, touched) in PATTERNS.items():
                hidden = [1 - (1 - s) * 4096 / T for s in (sparsity, touched)]
                hidden = [sparsity, touched] if "random" in name or "strided" in name else hidden
                more = {"D": D, "phase": phase, "pattern": name, "tier": "patterns"}
                entries += [entry(m, T, hidden=hidden, **more) for m in SPARSE]
        for share in SHARES if 16384 in lengths else ():
            # A tile of 128 x 64 holds two blocks.
            hidden, name = (1 - share, (1 - share) ** 2), f"random_blocks(64, {share})"
            more = {"D": D, "phase": phase, "pattern": name, "tier": "sparsity"}
            entries.append(entry("block_sparse", 16384, hidden=hidden, **more))
    return entries


def everything():
    """The sweep and the patterns, each id once."""
    entries = {one["extra_info"]["id"]: one for one in [*patterns(), *sweep()]}
    return list(entries.values())


def read_write(path, entries, **machine_options):
    """Writes the file as of one GPU and gives its path."""
    options = {"device": "1x NVIDIA H200", "ranks": 1} | machine_options
    write(path, entries, **options)
    return str(path)


def _seen(Tq, Tk):
    """The share of pairs with key <= query."""
    corner = min(Tq, Tk)
    return (corner * (corner + 1) / 2 + (Tq - corner) * Tk) / (Tq * Tk)


def _errors(chance):
    relative = 0.0021 * (1 + 0.1 * chance.random())
    return {
        "relative": relative,
        "max": relative * 12,
        "mean": relative * 0.7,
        "max_relative": relative * 8,
        "dense_relative": 0.0021,
        "ratio": relative / 0.0021,
        "limit": 1.5,
    }


def _pattern(case, method, sparsity, touched):
    info = {
        "name": case["pattern"],
        "sparsity": sparsity,
        "ideal_speedup": 1 / (1 - sparsity),
    }
    if method.startswith("block_sparse"):
        info |= {
            "touched_sparsity": touched,
            "touched_ideal_speedup": 1 / (1 - touched),
            "table_seconds": 0.012 * case["Tq"] / 4096,
            "table_bytes": 60_000 * case["Tq"] // 4096,
            "block_q": 128,
            "block_k": 64,
        }
    return info
