"""Rows of the attention tables, and the README's: throughput of dense attention, and patterns.

All ratios are of speed: above 1 the first method named is the faster.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from tools.cases import Result, Results
from tools.families.attention.points import (
    FLEX,
    NAMING,
    OURS,
    PHASES,
    SPARSE,
    UNPRUNED,
    Point,
    attention,
    best_dense,
    by_point,
    by_setting,
    ideal,
    place_order,
    point_of,
    speed,
)
from tools.stats import Interval
from tools.tables import (
    Column,
    as_markdown,
    figure,
    milliseconds,
    number,
    percent,
)

RATIOS = ((OURS, "sdpa_flash"), (OURS, "sdpa_cudnn"), (SPARSE, FLEX), (SPARSE, UNPRUNED))
MOST_ROWS, OF_A_KIND = 40, 3
PLACE = (
    Column("tier", "tier"),
    number("tokens", "T"),
    number("heads", "batch × heads"),
    number("D", "D"),
    Column("mask", "mask"),
)


def interval(value: Interval) -> str:
    """A ratio with its interval; alone where there are too few samples for one."""
    return str(value) if value.enough else f"{value.value:.3f}"


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


def readme_tables(results: Results) -> list[tuple[str, str, str]]:
    """(words, setting, Markdown) of each table: dense attention and patterns, phase by phase, of
    the setting with the most results.
    """
    text, found = next(iter(by_setting(attention(results)).items()), ("", []))
    tables = []
    for phase, words in PHASES.items():
        here = [r for r in found if r.case.phase == phase]
        dense = [r for r in here if point_of(r.case).pattern is None]
        few, left = _few(dense)
        if dense:
            words_ = f"Attention, {words}: TFLOP/s of the pairs that attend{left}."
            tables.append((words_, text, _dense_table(ratio_rows(few, here))))
        patterns = [r for r in here if point_of(r.case).pattern is not None]
        patterns = [r for r in patterns if r.case.method in (FLEX, SPARSE, UNPRUNED)]
        patterns.sort(key=_by_size)
        if patterns:
            words_ = (
                f"Attention with patterns, {words}: median ms. s: sparsity of the pairs, and of "
                f"the tiles that {SPARSE} touches. dense: the fastest kernel of this run without "
                f"the pattern, a causal one where the pattern is causal. ideal: 1 / (1 - s) of the "
                "tiles."
            )
            tables.append((words_, text, _pattern_table(ratio_rows(patterns, here))))
    return tables


def _by_size(result: Result) -> tuple:
    """Orders patterns as if they were of one tier, which their table does not show."""
    return place_order(replace(point_of(result.case), tier=""))


def _dense_table(rows: list[dict]) -> str:
    methods = sorted(
        {key for row in rows for key, cell in row.items() if isinstance(cell, Result)},
        key=NAMING.place,
    )
    columns = [*PLACE, *(number(method, method, _rate) for method in methods)]
    columns += [number(f"{a} / {b}", f"{a} / {b}", interval) for a, b in RATIOS]
    return _filled(columns, rows)


def _pattern_table(rows: list[dict]) -> str:
    columns = [
        Column("mask", "pattern"),
        *PLACE[1:4],
        number("sparsity", "s", percent),
        number("touched_sparsity", "s of tiles", percent),
        number("dense", "dense", lambda r: f"{milliseconds(r.median)} ({r.case.method})"),
        *(number(method, method, lambda r: milliseconds(r.median)) for method in (FLEX, SPARSE)),
        *(number(f"{a} / {b}", f"{a} / {b}", interval) for a, b in RATIOS[2:]),
        number(f"{SPARSE} / dense", f"{SPARSE} / dense", interval),
        number(f"{SPARSE} ideal", "ideal", figure),
        number(f"{SPARSE} of ideal", "of ideal", percent),
    ]
    return _filled(columns, rows)


def _filled(columns: list[Column], rows: list[dict]) -> str:
    filled = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    return as_markdown(filled, rows)


def _rate(result: Result) -> str:
    rate = result.rates.get("tflops")
    return "–" if rate is None else figure(rate)


def _few(results: Sequence[Result]) -> tuple[list[Result], str]:
    """The results at as many points as a table carries, and words for those left out: the first,
    the middle and the last of each tier, D and mask.
    """
    points = list(by_point(results))
    if len(points) <= MOST_ROWS:
        return list(results), ""
    kinds = defaultdict(list)
    for point in points:
        kinds[point.tier, point.D, point.causal].append(point)
    kept = {
        kind[round(i * (len(kind) - 1) / (OF_A_KIND - 1))]
        for kind in kinds.values()
        for i in range(OF_A_KIND)
    }
    shown = [r for r in results if point_of(r.case) in kept]
    return shown, f" ({len(kept)} of {len(points)} points; the report has the others)"
