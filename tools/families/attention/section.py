"""The report's section on attention: speed, ratios, patterns and errors, then its figures."""

from collections.abc import Callable, Sequence

from tools.cases import Result, Results
from tools.families.attention.points import FLEX, PHASES, SPARSE, attention, by_point, point_of
from tools.families.attention.tables import (
    PLACE,
    RATIOS,
    interval,
    pattern_cells,
    place,
    ratio_rows,
)
from tools.families.figures import ATTENTION_FIGURES, Drawing
from tools.families.linear.case_table import folded_table
from tools.stats import Interval, combine
from tools.tables import Column, count, figure, milliseconds, number, percent, seconds, size

READING = (
    "softmax(scale · Q Kᵀ) V, by several kernels. TFLOP/s count the pairs that attend, so masked "
    "pairs add nothing. Ratios here are of <b>speed</b>: above 1 the first method named is the "
    "faster. A pattern hides the share <b>s</b> of all pairs (sparsity); a list of blocks computes "
    "every tile that it touches, so its ideal is 1 / (1 - s) of the tiles. <b>dense</b> is the "
    "fastest kernel of these results without the pattern, at the same sizes: a causal one where "
    "the pattern is causal."
)
TENSORS = ("output", "grad_q", "grad_k", "grad_v")
WHERE = (*PLACE[:4], Column("dtype", "dtype"), PLACE[4])


def section(results: Results, drawings: list[Drawing], plot: Callable[[Drawing], str]) -> str:
    """The section as HTML; `plot` gives that of one drawing. Empty without attention."""
    found = attention(results)
    if not found:
        return ""
    figures = [d for d in drawings if d.name.startswith(tuple(ATTENTION_FIGURES))]
    main, others = figures[:1], figures[1:]
    parts = ['<h2 id="attention">Attention</h2>', f'<p class="muted">{READING}</p>']
    parts += map(plot, main)
    for phase, words in PHASES.items():
        parts += _phase(f"Attention, {words}", [r for r in found if r.case.phase == phase])
    parts.append(_patterns(found))
    parts += map(plot, others)
    return "\n".join(part for part in parts if part)


def _phase(title: str, here: Sequence[Result]) -> list[str]:
    ratios = [
        *WHERE,
        *(number(f"{a} / {b}", f"{a} / {b}", interval) for a, b in RATIOS),
        number("dense", "dense", lambda result: result.case.method),
        *(
            column
            for name in (SPARSE, FLEX)
            for column in (
                number(f"{name} / dense", f"{name} / dense", interval),
                number(f"{name} ideal", f"ideal of {name}", figure),
                number(f"{name} of ideal", f"{name} of ideal", percent),
            )
        ),
    ]
    rows = [row for row in ratio_rows(here, here) if any(" / " in key for key in row)]
    return [
        _table(f"{title}: ratios of speed", ratios, rows, "points", opened=True),
        _table(title, CASES, [_case(result) for result in here], "cases"),
        _table(f"{title}: errors", _error_columns(), [_errors(r) for r in here], "cases"),
    ]


CASES = (
    *WHERE,
    Column("method", "method"),
    number("median", "median ms [95%]", lambda value: _times(value)),
    number("samples", "samples"),
    number("tflops", "TFLOP/s", figure),
    number("matrix", "of the matrix rate", percent),
    number("limit", "of its limit", percent),
    number("tokens_per_s", "tokens/s", count),
    number("forward", "forward ms", milliseconds),
    number("backward", "backward ms", milliseconds),
    number("peak", "peak memory", size),
    number("inputs", "inputs", size),
    Column("path", "path"),
    Column("timing", "timing"),
    Column("id", "case"),
)


def _case(result: Result) -> dict:
    regions = {name: region.p50 for name, region in result.regions.items()}
    timing = (str(result.timing[k]) for k in ("mode", "l2") if result.timing.get(k))
    return place(point_of(result.case)) | {
        "id": result.id,
        "method": result.label,
        "median": combine(lambda median: median, [result.samples]),
        "samples": len(result.samples),
        "tflops": result.rates.get("tflops"),
        "matrix": result.rates.get("matrix_fraction"),
        "limit": result.rates.get("limit_fraction"),
        "tokens_per_s": result.rates.get("tokens_per_s"),
        "forward": regions.get("forward"),
        "backward": regions.get("backward"),
        "peak": result.memory.get("peak_bytes"),
        "inputs": result.memory.get("input_bytes"),
        "path": "; ".join(f"{name}: {path}" for name, path in result.paths.items()) or None,
        "timing": " ".join(timing),
    }


def _times(value: Interval) -> str:
    middle = milliseconds(value.value)
    ends = f"[{milliseconds(value.low)}, {milliseconds(value.high)}]"
    return f"{middle} {ends}" if value.enough else middle


def _error_columns() -> list[Column]:
    columns = [*WHERE, Column("method", "method")]
    for tensor in TENSORS:
        columns.append(number(tensor, tensor, figure))
        columns.append(number(f"{tensor} ratio", "over reference", figure))
        columns.append(number(f"{tensor} max", "largest", figure))
    return [*columns, number("limit", "limit", figure)]


def _errors(result: Result) -> dict:
    row = place(point_of(result.case)) | {"method": result.label}
    for tensor, errors in result.errors.items():
        row |= {
            tensor: errors.get("relative"),
            f"{tensor} ratio": errors.get("ratio"),
            f"{tensor} max": errors.get("max"),
            "limit": errors.get("limit"),
        }
    return row


def _patterns(found: Sequence[Result]) -> str:
    """A row for each pattern and size; phases, dtypes and D share one where the table is shared."""
    rows: dict[tuple, dict] = {}
    for point, methods in by_point(found).items():
        if point.pattern:
            cells = place(point) | pattern_cells(methods.values())
            key = (point.mask, point.tokens, cells["heads"], cells.get("blocks"))
            rows.setdefault(key, cells)
    columns = [
        Column("mask", "pattern"),
        *PLACE[1:3],
        number("sparsity", "sparsity", percent),
        number("ideal_speedup", "ideal speedup", figure),
        number("touched_sparsity", "sparsity of tiles", percent),
        number("touched_ideal_speedup", "ideal of tiles", figure),
        number("blocks", "tile"),
        number("table_seconds", "table built in", seconds),
        number("table_bytes", "table", size),
    ]
    return _table("Attention: patterns and their tables", columns, list(rows.values()), "patterns")


def _table(title: str, columns, rows: list[dict], unit: str, *, opened: bool = False) -> str:
    filled = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    example = {"example": "causal 4096"}
    return folded_table(title, filled, rows, unit, opened=opened, **example) if rows else ""
