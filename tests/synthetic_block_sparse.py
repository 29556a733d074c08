"""Files of block-sparse layers, made up over the cases of the sweeps: nobody measured them."""

import zlib

from bench import sweep
from tests.synthetic_results import samples, write

__all__ = ["entry", "everything", "study", "trained", "write"]

SWEEPS = ("layers", "backward", "planning", "models", "supermask")
PRODUCT = 6e14  # operations a second of a dense product
# How many times as fast as dense, by tile, for each tenth of a weight that is dropped beyond half.
GAINS = {32: 0.55, 64: 1.2, 128: 1.8}
ACCURACY = {0.0: 98.4, 0.8: 98.1, 0.9: 97.5}


def seconds(case):
    """Of a step, by a rule of thumb."""
    gain = 1 + GAINS.get(case.block, 1) * 10 * max(0, case.sparsity - 0.5)
    dense = 2 * case.B * case.N * case.K / PRODUCT
    if case.phase in ("model", "supermask"):
        dense *= 100 * case.depth
        gain = 1 + 0.1 * gain
    if case.phase == "backward":
        dense, gain = 3 * dense, 0.8 * gain
    return {
        "dense": dense,
        "bsr": dense / gain,
        "torch_bsr": 1.8 * dense / gain,
        "semi_structured": 0.7 * dense,
        "plan": 0.05 * dense / gain,
        "supermask": 1.1 * dense,
    }[case.method]


def entry(case, point, time=None):
    """One element of "benchmarks" of a case, measured beside the others of its point."""
    took = time or seconds(case)
    info = {
        "schema": 1,
        "id": case.id,
        "usual": {},
        "case": case.as_dict(),
        "device": "cuda",
        "timing": {
            "mode": "graph",
            "l2": "warm",
            "interleaved_with": [one.label for one in point if one is not case],
        },
        "errors": {"output": {"relative": 0.002, "dense_relative": 0.002, "ratio": 1.0}},
        "regions": {"total": {"avg": took, "p50": took, "p95": took, "calls": 1, "bytes": 0}},
        "memory": {"peak_bytes": 10**9, "weight_bytes": 10**8},
        "floor": {"seconds": 0.3 * took},
        "rates": {"tokens_per_s": case.B / took, "limit_fraction": 0.3},
        "paths": {"forward": "made up"},
    }
    data = {"data": samples(took, seed=zlib.crc32(case.id.encode()))}
    name = f"bench_{case.phase}[{case.name}]"
    return {"name": name, "group": case.group, "stats": data, "extra_info": info}


def cases():
    """Of the sweeps of a GPU."""
    found = []
    for name in SWEEPS:
        loaded = sweep.load(name, ["block_sparse"])["block_sparse"]
        found += [c for p in loaded["phases"] for c in sweep.cases(loaded, p, "cuda", 1, {})]
    return found


def everything(**times):
    """All cases of the sweeps. times: seconds by id, where they are not by the rule."""
    found = cases()
    points = {}
    for case in found:
        points.setdefault(case.point, []).append(case)
    return [entry(case, points[case.point], times.get(case.id)) for case in found]


def study(method, sparsity, seed, top1, recipe="aaaaaaaa"):
    """A case of the study of accuracies."""
    case = {
        "family": "block_sparse",
        "phase": "study",
        "method": method,
        "N": 256,
        "K": 64,
        "B": 64,
        "block": 16,
        "sparsity": sparsity,
        "depth": 4,
        "heads": 4,
        "patch": 2,
        "image": 8,
        "shape": "digits",
        "steps": 1000,
        "dtype": "fp32",
        "seed": seed,
        "ranks": 1,
        "recipe": recipe,
    }
    info = {
        "schema": 1,
        "id": f"block_sparse_study/{method}-{sparsity}-{recipe}-{seed}",
        "case": case,
        "device": "cpu",
        "rates": {"top1": top1, "top5": 100.0, "loss": 0.1},
        "curves": {"step": [50, 100], "loss": [1.0, 0.5]},
    }
    return {
        "name": f"study[{method}-{sparsity}-{seed}]",
        "group": "study",
        "stats": {"data": [0.03, 0.03]},
        "extra_info": info,
    }


def trained(below=ACCURACY):
    """Dense and pruned models of three seeds; below: mean accuracy by sparsity."""
    made = []
    for sparsity, top1 in below.items():
        methods = ("supermask", "bsr") if sparsity else ("dense",)
        made += [
            study(m, sparsity, seed, top1 + 0.2 * (seed - 1)) for m in methods for seed in range(3)
        ]
    return made
