"""Measures which kernel and which sum over ranks are fastest here, for "auto".

    python -m blockshock.tune --ranks 2 --N 4096,8192,16384 --B 64,1024,4096 [--dtype bf16,fp16]

For every N = K and B: on each rank the 2:4 products of one term by all kernels (each compared with
the dense product first), then the sum over ranks of dense half products, as `dense_tp_row` has it,
in every way. Times are device times of CUDA graphs, all candidates in turn. The entries go into
this GPU's table (`blockshock.choices`), in place of those of the same size; `--out FILE` names
another one.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from blockshock import choices, masks
from blockshock.distributed import collectives, open_ranks, reduce, symmetric
from blockshock.distributed.reduce import Plan
from blockshock.kernels import products, sparse24, thin24
from blockshock.measure import clock
from blockshock.measure.errors import relative_error
from blockshock.packed import Packed24

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {"columns": "1100", "periodic": "tile", "free": "random"}
ROUNDS = 10
PLANS = [
    *(Plan("collective", chunks) for chunks in (0, 2, 4)),
    Plan("two_shot"),
    *(Plan("exchange", chunks) for chunks in (0, 1, 2, 3, 4, 6, 8)),
]
THIN_ROWS = 512  # beyond it the thin kernel reads the weight too often to be a candidate


def measure(sizes: list[tuple[int, int, str]]) -> dict[str, list[dict]]:
    """The entries for (N, B, dtype); called in every rank of the default group."""
    device = torch.device("cuda", torch.cuda.current_device())
    token = torch.zeros(1, device=device)
    stopwatch = clock.Stopwatch("graph", device, lambda: collectives.all_reduce(token))
    found = {"products": [], "sums": []}
    for N, B, name in sizes:
        found["products"] += _products(N, B, DTYPES[name], stopwatch)
        if collectives.group_size() > 1:
            found["sums"].append(_sums(N, B, DTYPES[name], stopwatch))
    return found


def _products(N: int, B: int, dtype: torch.dtype, stopwatch) -> list[dict]:
    ranks = collectives.group_size()
    K = N // max(1, ranks // 2)
    x = torch.randn(B, K, device=stopwatch.device).to(dtype)
    entries = []
    for kind, pattern in KINDS.items():
        packed = Packed24.empty(N, K, dtype=dtype, device=stopwatch.device)
        for start in range(0, N, 256):
            rows = torch.randn(min(256, N - start), K, device=stopwatch.device).to(dtype)
            packed.write_rows(start, rows, masks.make(pattern, rows, start=start))
        steps = {}
        for kernel in _candidates(kind, B, dtype):
            step = _product(packed, x, kernel)
            if relative_error(step(), F.linear(x, packed.unpack())) > torch.finfo(dtype).eps:
                raise RuntimeError(f"kernel {kernel} is wrong at N = K = {N}, B = {B}, {dtype}")
            steps[kernel] = step
        seconds = _times(steps, stopwatch)
        size = {"N": N, "K": K, "B": B, "dtype": str(dtype).removeprefix("torch.")}
        entries.append(size | {"mask": kind, "kernel": min(seconds, key=seconds.get)})
        entries[-1]["seconds"] = seconds
    return entries


def _candidates(kind: str, B: int, dtype: torch.dtype) -> list[str]:
    kernels = ["cusparselt"] if sparse24.unsupported(dtype, "cuda") is None else []
    if B <= THIN_ROWS and thin24.unsupported(dtype, "cuda") is None:
        kernels.append("thin")
    return [*kernels, "folded"] if kind == "columns" else kernels


def _product(packed: Packed24, x: torch.Tensor, kernel: str):
    return lambda: packed.product(x, None, kernel)


def _sums(N: int, B: int, dtype: torch.dtype, stopwatch) -> dict:
    ranks = collectives.group_size()
    x, weight = (
        torch.randn(rows, N // ranks, device=stopwatch.device).to(dtype) for rows in (B, N)
    )
    plans = {str(plan): plan for plan in PLANS if _possible(plan, B, N, dtype)}

    def step(plan: Plan):
        return lambda: reduce.begin_sum(lambda rows: F.linear(rows, weight), x, plan).wait()

    seconds = _times({name: step(plan) for name, plan in plans.items()}, stopwatch)
    best = plans[min(seconds, key=seconds.get)]
    return {
        "ranks": ranks,
        "N": N,
        "K": N // ranks,
        "B": B,
        "dtype": str(dtype).removeprefix("torch."),
        "how": best.how,
        "chunks": best.chunks,
        "seconds": seconds,
    }


def _possible(plan: Plan, B: int, N: int, dtype: torch.dtype) -> bool:
    if plan.how == "collective":
        return 128 * plan.chunks <= B
    if reduce.unsupported(plan.how, dtype, "cuda") or symmetric.why_not():
        return False
    if plan.how == "two_shot":
        return True
    small = B * N * dtype.itemsize <= symmetric.PUSH_BYTES
    return small if plan.chunks == 0 else B // plan.chunks >= 128 or plan.chunks == 1


def _times(steps: dict, stopwatch) -> dict[str, float]:
    """Median seconds of each step, the slowest rank's, measured in turn."""
    prepared = {name: stopwatch.prepare(step) for name, step in steps.items()}
    runs = [run for run, _ in prepared.values()]
    rounds = clock.measure(stopwatch, runs, ROUNDS)
    seconds = {}
    for (name, (_, calls)), times in zip(prepared.items(), rounds, strict=True):
        median = sorted(times)[len(times) // 2] / calls
        seconds[name] = clock.agree_largest(median, stopwatch.device)
    return seconds


def merge(old: dict[str, list[dict]], new: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The new entries, and those of the old ones whose sizes are not measured anew."""
    merged = {}
    for kind, entries in new.items():
        keys = choices.KINDS[kind] - {"kernel", "how", "chunks"}
        again = {tuple(entry[key] for key in sorted(keys)) for entry in entries}
        kept = [e for e in old[kind] if tuple(e[key] for key in sorted(keys)) not in again]
        merged[kind] = sorted(
            kept + entries, key=lambda e: (e.get("ranks", 0), e["dtype"], e["N"], e["K"], e["B"])
        )
    return merged


def save(table: dict[str, list[dict]], file: Path) -> None:
    """Whole or not at all; an entry a line, so that a change is read easily."""
    parts = []
    for kind, entries in table.items():
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        parts.append(f' "{kind}": [\n{lines}\n ]')
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    partial.replace(file)
    choices.forget()
    products.choose.cache_clear()


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m blockshock.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ranks", type=int, default=2, help="GPUs that share a layer (default 2)")
    add = parser.add_argument
    add("--N", type=_numbers, default=[4096, 8192, 16384], metavar="N[,N]", help="sides of W")
    add("--B", type=_numbers, default=[16, 64, 128, 1024, 4096], metavar="B[,B]", help="rows of x")
    add("--dtype", type=_dtypes, default=["bf16"], metavar="D[,D]", help="bf16, fp16")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table (default: the user's)")
    options = parser.parse_args(argv)
    count = torch.cuda.device_count()
    if options.ranks < 1:
        parser.error(f"--ranks {options.ranks}: at least one GPU is needed")
    if count < options.ranks:
        parser.error(f"--ranks {options.ranks}: a GPU for each rank is needed, found {count}")
    bad = [N for N in options.N if N % (64 * options.ranks)]
    if bad:
        parser.error(f"--N {bad[0]} is no multiple of {64 * options.ranks} (64 a rank)")
    sizes = [(N, B, d) for d in options.dtype for N in options.N for B in options.B]
    file = options.out or choices.folder() / choices.file_name()
    with open_ranks(options.ranks, "cuda") as ranks:
        for size in sizes:
            found = ranks.run(measure, [size], timeout=600)[0]
            save(merge(choices.read(file), found), file)
            for entry in found["products"] + found["sums"]:
                print(_line(entry), flush=True)
    print(f"written to {file}")
    return 0


def _line(entry: dict) -> str:
    best = min(entry["seconds"].values())
    chosen = entry.get("kernel") or str(Plan(entry["how"], entry["chunks"]))
    others = sorted(entry["seconds"].items(), key=lambda item: item[1])[1:4]
    beside = ", ".join(f"{name} {seconds / best:.2f}x" for name, seconds in others)
    what = entry.get("mask") or f"sum over {entry['ranks']}"
    size = f"N={entry['N']} K={entry['K']} B={entry['B']} {entry['dtype']}"
    return f"{size} {what}: {chosen} {best * 1e3:.4f} ms" + (f"; {beside}" if beside else "")


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are whole numbers from 1 on")
    return [int(word) for word in words]


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"{name!r}: use {', '.join(DTYPES)}")
    return names


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
