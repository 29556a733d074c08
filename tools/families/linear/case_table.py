"""The report's tables: every case of a phase with all its figures, a row each."""

from tools.cases import Result, Results
from tools.tables import (
    Column,
    Table,
    count,
    figure,
    milliseconds,
    number,
    size,
)

PHASE_TITLES = {
    "correctness": "Correctness: output and all gradients against the truth",
    "forward": "Forward",
    "backward": "Backward: forward and the gradient of the input, weights frozen",
    "training": "Training: one step",
    "drift": "Drift: T forward-only steps",
}

COLUMNS = (
    Column("id", "case"),
    Column("method", "method"),
    number("N", "N"),
    number("B", "B"),
    Column("mask", "mask"),
    Column("optimizer", "optimizer"),
    number("median", "median ms", milliseconds),
    number("p95", "p95 ms", milliseconds),
    number("samples", "samples"),
    number("tokens", "tokens/s", count),
    number("tflops", "TFLOP/s", figure),
    number("over_floor", "over floor", figure),
    number("forward", "forward ms", milliseconds),
    number("backward", "backward ms", milliseconds),
    number("allreduce", "all-reduce ms", milliseconds),
    number("allgather", "all-gather ms", milliseconds),
    number("layout_fix", "layout fix ms", milliseconds),
    number("compress", "compress ms", milliseconds),
    number("step_optimizer", "optimizer ms", milliseconds),
    number("error", "output error", figure),
    number("error_ratio", "over dense", figure),
    number("grad_error_ratio", "worst other over dense", figure),
    number("drift", "last drift", figure),
    number("drift_dense", "last drift of dense", figure),
    number("weight", "weights", size),
    number("peak", "peak memory", size),
    number("build_peak", "peak of the build", size),
    Column("path", "path"),
    Column("timing", "timing"),
)


def phase_table(results: Results, phase: str) -> Table:
    """The table of a phase, each case of a linear layer in a row."""
    found = [r for r in results.results if r.case.phase == phase]
    title = PHASE_TITLES.get(phase, phase)
    return Table(title, COLUMNS, [_row(r) for r in found], example="block_shock 4096")


def _row(result: Result) -> dict:
    case = result.case
    regions = {name: region.avg for name, region in result.regions.items()}
    ratios = [e["ratio"] for t, e in result.errors.items() if t != "output" and "ratio" in e]
    floor = result.floor.get("seconds")
    output = result.errors.get("output", {})
    return {
        "id": result.id,
        "method": result.label,
        "N": case.N,
        "B": case.B,
        "mask": case.mask,
        "optimizer": case.optimizer,
        "median": result.median,
        "p95": result.p95,
        "samples": len(result.samples),
        "tokens": result.rates.get("tokens_per_s"),
        "tflops": result.rates.get("dense_tflops"),
        "over_floor": result.median / floor if floor else None,
        **{
            k: regions.get(k)
            for k in ("forward", "backward", "allreduce", "allgather", "layout_fix", "compress")
        },
        "step_optimizer": regions.get("optimizer"),
        "error": output.get("relative"),
        "error_ratio": output.get("ratio"),
        "grad_error_ratio": max(ratios, default=None),
        "drift": (result.drift.get("method") or (None,))[-1],
        "drift_dense": (result.drift.get("dense") or (None,))[-1],
        "weight": result.memory.get("weight_bytes"),
        "peak": result.memory.get("peak_bytes"),
        "build_peak": result.memory.get("build_peak_bytes"),
        "path": "; ".join(f"{name}: {path}" for name, path in result.paths.items()) or None,
        "timing": " ".join(str(result.timing[k]) for k in ("mode", "l2") if result.timing.get(k)),
    }
