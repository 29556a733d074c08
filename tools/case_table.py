"""The report's table of cases: a row each with all its figures, whatever its family."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from tools.cases import Result
from tools.tables import Column, Table, count, figure, milliseconds, number, percent, size

REGIONS = {
    "forward": "forward",
    "backward": "backward",
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "layout_fix": "layout fix",
    "compress": "compress",
    "optimizer": "optimizer",
}
FIGURES = (
    number("median", "median ms", milliseconds),
    number("p95", "p95 ms", milliseconds),
    number("samples", "samples"),
    number("tokens_per_s", "tokens/s", count),
    number("tflops", "TFLOP/s", figure),
    number("matrix_fraction", "of the matrix rate", percent),
    number("over_floor", "over floor", figure),
    *(number(f"{name} region", f"{title} ms", milliseconds) for name, title in REGIONS.items()),
    number("error", "output error", figure),
    number("error_ratio", "over plain", figure),
    number("other_ratio", "worst other over plain", figure),
    number("drift", "last drift", figure),
    number("drift_dense", "last drift of dense", figure),
    number("weight_bytes", "weights", size),
    number("input_bytes", "inputs", size),
    number("peak_bytes", "peak memory", size),
    number("build_peak_bytes", "peak of the build", size),
    Column("path", "path"),
    Column("timing", "timing"),
)


def case_table(
    title: str,
    results: Iterable[Result],
    where: Sequence[Column] = (),
    place: Callable[[Result], dict] = lambda result: result.case.fields,
    example: str = "4096",
) -> Table:
    """A table of results. where: the columns that say which case it is, filled by `place`."""
    columns = (Column("id", "case"), Column("method", "method"), *where, *FIGURES)
    return Table(title, columns, [place(r) | _figures(r) for r in results], example=example)


def by_phase(
    titles: Mapping[str, str],
    of_phase: Callable[[str], list[Result]],
    by_place: Callable[[list[Result]], dict[Any, list[Result]]],
    where: Sequence[Column],
    cells: Callable[[Result, Sequence[Result]], dict],
    example: str,
) -> list[Table]:
    """A table of each phase that has results. cells: of (result, results of its point)."""
    made = []
    for phase, title in titles.items():
        found = of_phase(phase)
        near = {r.id: here for here in by_place(found).values() for r in here}
        place = partial(_placed, cells, near)
        made.append(case_table(title, found, where, place, example))
    return [table for table in made if table.rows]


def _placed(cells: Callable, near: Mapping[str, Sequence[Result]], result: Result) -> dict:
    return cells(result, near[result.id])


def _figures(result: Result) -> dict:
    output, floor = result.errors.get("output", {}), result.floor.get("seconds")
    others = [e["ratio"] for t, e in result.errors.items() if t != "output" and "ratio" in e]
    timing = (str(result.timing[key]) for key in ("mode", "l2") if result.timing.get(key))
    return {
        "id": result.id,
        "method": result.label,
        "median": result.median,
        "p95": result.p95,
        "samples": len(result.samples),
        "tflops": result.rates.get("dense_tflops"),
        **result.rates,
        "over_floor": result.median / floor if floor else None,
        **{f"{name} region": region.avg for name, region in result.regions.items()},
        "error": output.get("relative"),
        "error_ratio": output.get("ratio"),
        "other_ratio": max(others, default=None),
        "drift": (result.drift.get("method") or (None,))[-1],
        "drift_dense": (result.drift.get("dense") or (None,))[-1],
        **result.memory,
        "path": "; ".join(f"{name}: {path}" for name, path in result.paths.items()) or None,
        "timing": " ".join(timing),
    }
