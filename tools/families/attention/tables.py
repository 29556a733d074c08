"""Rows of the attention tables: throughput of dense attention, and patterns.

All ratios are of speed: above 1 the first method named is the faster.
"""

from collections.abc import Iterable, Sequence

from tools.cases import Result
from tools.families.attention.points import (
    FLEX,
    OURS,
    SPARSE,
    UNPRUNED,
    Point,
    best_dense,
    by_point,
    ideal,
    speed,
)
from tools.tables import Column, interval, number

RATIOS = ((OURS, "sdpa_flash"), (OURS, "sdpa_cudnn"), (SPARSE, FLEX), (SPARSE, UNPRUNED))
RATIO_COLUMNS = tuple(number(f"{a} / {b}", f"{a} / {b}", interval) for a, b in RATIOS)
PLACE = (
    Column("tier", "tier"),
    number("tokens", "T"),
    number("heads", "batch × heads"),
    number("D", "D"),
    Column("mask", "mask"),
)


def place(point: Point) -> dict:
    """The cells that say where a row stands."""
    heads = str(point.heads)
    heads += f" over {point.kv_heads}" if point.kv_heads != point.heads else ""
    return {
        "tier": point.tier or None,
        "tokens": point.tokens,
        "heads": f"{point.batch} × {heads}",
        "D": point.D,
        "dtype": point.dtype,
        "mask": point.mask,
    }


def ratio_rows(results: Sequence[Result], every: Sequence[Result]) -> list[dict]:
    """A row for each point: its methods, the ratios of interest, and speedups with their ideal.

    every: where the dense kernels are looked for.
    """
    rows = []
    for point, methods in by_point(results).items():
        row = place(point) | methods
        for one, other in RATIOS:
            if one in methods and other in methods:
                row[f"{one} / {other}"] = speed(methods[one], methods[other])
        if point.pattern:
            for method in (SPARSE, FLEX):
                row |= speedup(methods.get(method), every)
            row |= pattern_cells(methods.values())
        rows.append(row)
    return rows


def speedup(result: Result | None, every: Sequence[Result]) -> dict:
    """Cells of a pattern's kernel: the best dense one, the speedup over it, and the ideal."""
    dense = best_dense(result, every) if result else None
    if dense is None:
        return {}
    name, ratio, best = result.case.method, speed(result, dense), ideal(result)
    cells = {"dense": dense, f"{name} / dense": ratio, f"{name} ideal": best}
    return cells | ({f"{name} of ideal": ratio.value / best} if best else {})


def pattern_cells(methods: Iterable[Result]) -> dict:
    """What the results of a point say of its pattern; a block list's own figures before others."""
    order = {SPARSE: 2, UNPRUNED: 1}
    cells: dict = {}
    for result in sorted(methods, key=lambda r: order.get(r.case.method, 0)):
        cells |= {name: value for name, value in result.pattern.items() if value is not None}
    cells.pop("name", None)
    if "block_q" in cells and "block_k" in cells:
        cells["blocks"] = f"{cells['block_q']} × {cells['block_k']}"
    return cells
