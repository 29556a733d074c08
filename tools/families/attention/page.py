"""What attention shows: figures in the order of the report, its tables, and how to read them."""

import functools
from collections.abc import Sequence

from tools.case_table import case_table
from tools.cases import Result, Results, fastest
from tools.families.attention.points import (
    FLEX,
    NAMING,
    OURS,
    PEERS,
    PHASES,
    SPARSE,
    attention,
    by_point,
    point_of,
    speed,
)
from tools.families.attention.readme_tables import full, readme
from tools.families.attention.scaling import matrix_share, memory_vs_tokens, time_vs_tokens
from tools.families.attention.sparsity import speedup_vs_sparsity
from tools.families.attention.speed import speed_by_tier
from tools.families.attention.tables import (
    PLACE,
    RATIO_COLUMNS,
    pattern_cells,
    place,
    ratio_rows,
)
from tools.family import TIMES, Family
from tools.tables import Column, Table, figure, interval, number, percent, seconds, size

READING = (
    *TIMES,
    (
        "TFLOP/s",
        "count the pairs that attend in softmax(scale · Q Kᵀ) V, so masked pairs add nothing.",
    ),
    ("Ratios here", "are of speed: above 1 the first method named is the faster."),
    (
        "s, the sparsity",
        "is the share of all pairs that a pattern hides; a list of blocks computes every tile that "
        "it touches, so its ideal is 1 / (1 - s) of the tiles.",
    ),
    (
        "dense",
        "is the fastest kernel of these results without the pattern, at the same sizes: a causal "
        "one where the pattern is causal.",
    ),
)
EXAMPLE = "causal 4096"
WHERE = (*PLACE[:4], Column("dtype", "dtype"), PLACE[4])


def tables(results: Results) -> list[Table]:
    """Ratios and cases of each phase, then the patterns."""
    found, made = attention(results), []
    for phase, words in PHASES.items():
        made += _phase(f"Attention, {words}", [r for r in found if r.case.phase == phase])
    return [table for table in (*made, _patterns(found)) if table.rows]


def _phase(title: str, here: Sequence[Result]) -> list[Table]:
    ratios = [
        *WHERE,
        *RATIO_COLUMNS,
        number("best peer", f"{OURS} / best peer", interval),
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
    rows = [_best(row) for row in ratio_rows(here, here) if any(" / " in key for key in row)]
    return [
        Table(f"{title}: ratios of speed", ratios, rows, "points", example=EXAMPLE),
        case_table(title, here, WHERE, lambda r: place(point_of(r.case)), EXAMPLE),
    ]


def _best(row: dict) -> dict:
    """The row with the speed of our kernel over that of the fastest peer, for dense attention."""
    peer = fastest(row[name] for name in PEERS if name in row)
    if peer and OURS in row and point_of(peer.case).pattern is None:
        row["best peer"] = speed(row[OURS], peer)
    return row


def _patterns(found: Sequence[Result]) -> Table:
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
    title = "Attention: patterns and their tables"
    return Table(title, columns, list(rows.values()), "patterns", example=EXAMPLE)


KINDS = {
    "by_tier": speed_by_tier,
    "vs_T": time_vs_tokens,
    "vs_sparsity": speedup_vs_sparsity,
    "matrix_share": matrix_share,
    "memory_vs_T": memory_vs_tokens,
}
FAMILY = Family(
    "Attention",
    "How near do attention kernels come to what the machine could do, and how much of its sparsity "
    "does a pattern turn into speed?",
    READING,
    {
        f"attention_{phase}_{name}": functools.partial(draw, phase=phase)
        for phase in PHASES
        for name, draw in KINDS.items()
    },
    tables,
    readme=readme,
    full=full,
    naming=NAMING,
)
