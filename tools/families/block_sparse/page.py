"""What block-sparse layers show: figures in the order of the report, tables, how to read them."""

from collections.abc import Sequence
from functools import partial

from tools.case_table import by_phase
from tools.cases import Result, Results
from tools.families.block_sparse import accuracy, speed
from tools.families.block_sparse.hypotheses import judge_all
from tools.families.block_sparse.points import (
    DENSE,
    MLPS,
    NAMING,
    OF_MODELS,
    OURS,
    PHASES,
    SQUARE,
    TORCH,
    by_place,
    of_method,
    of_phase,
    planning_share,
    shape,
    step_ratio,
)
from tools.families.block_sparse.points import speed as speed_over
from tools.family import README_ROWS, TIMES, Family, Written
from tools.tables import (
    Column,
    Table,
    as_markdown,
    count,
    figure,
    filled,
    interval,
    milliseconds,
    number,
)

READING = (
    *TIMES,
    (
        "A block",
        "is a square tile of the weight, kept or dropped whole. s is the share that is dropped.",
    ),
    (
        "dense, bsr, torch_bsr",
        "multiply by the same weight: with its zeros in it, by its kept tiles with our kernel, and "
        "by PyTorch's own BSR, whose bias is added afterwards.",
    ),
    (
        "semi_structured",
        "holds of that weight the largest two of every four entries: it computes another function, "
        "and is checked against that one.",
    ),
    (
        "plan",
        "is the lists of a mask, which a product needs where the mask is new. Beside it stands the "
        "product alone.",
    ),
    (
        "supermask",
        "trains a score for each tile with the weights, and finds the mask in every forward.",
    ),
)
EXAMPLE = "forward ViT-H"
PLACE = (
    Column("shape", "shape"),
    number("N", "N"),
    number("K", "K"),
    number("B", "rows or images"),
    number("block", "block"),
    number("sparsity", "s", "{:g}".format),
    Column("setting", "setting"),
)
COST = (
    number("over_dense", "speed over dense", interval),
    number("over_torch", "speed over torch_bsr", interval),
    number("share", "of the product", interval),
    number("step", "of a dense step", interval),
    number("images_per_s", "images/s", count),
    number("top1", "top-1 %", "{:.2f}".format),
)


def tables(results: Results) -> list[Table]:
    """Every case of each phase."""
    titles = {phase: f"Block-sparse: {words}" for phase, words in PHASES.items()}
    found = partial(of_phase, results)
    return by_phase(titles, found, by_place, (*PLACE, *COST), _cells, EXAMPLE)


def readme(results: Results) -> Written | None:
    """Layers at s = 0.9, block 64: milliseconds of each method, and our speed over dense and over
    PyTorch's BSR; None where nothing was measured so.
    """
    shown = {SQUARE: 0} | {sizes: 1 for both in MLPS.values() for sizes in both}
    points = [
        here
        for here in by_place(of_phase(results, "forward")).values()
        if (here[0].case.N, here[0].case.K) in shown
        and (here[0].case.block, here[0].case.sparsity, here[0].case.B) == (64, 0.9, 4096)
        and of_method(OURS, here)
    ]
    if not points:
        return None
    rows = [_row(here) for here in points[-README_ROWS:]]
    columns = (
        PLACE[0],
        *(number(name, f"{name} ms", milliseconds) for name in (DENSE, TORCH, OURS)),
        number("semi_structured", "2:4 ms", milliseconds),
        *COST[:2],
    )
    words = (
        "Forward of a layer of 4096 rows whose weight keeps a tenth of its 64 × 64 tiles: median "
        "ms, and the speed of bsr over the others."
    )
    return Written(words, points[0][0].setting, as_markdown(filled(columns, rows), rows))


def full(results: Results) -> list[Written]:
    """A table of each phase and setting."""
    made = []
    for phase, words in PHASES.items():
        groups: dict[str, list[Result]] = {}
        for result in of_phase(results, phase):
            groups.setdefault(result.setting, []).append(result)
        made += [
            Written(f"Block-sparse {words}.", setting, _markdown(found, phase))
            for setting, found in groups.items()
        ]
    return made


def _row(here: Sequence[Result]) -> dict:
    """A row of the README: medians by method."""
    own = of_method(OURS, here)
    return _cells(own, here) | {r.case.method: r.median for r in here}


def _markdown(found: Sequence[Result], phase: str) -> str:
    near = {r.id: here for here in by_place(found).values() for r in here}
    seeds = [number("seed", "seed")] * (phase == "study")
    rows_of = number("B", "images" if phase in OF_MODELS else "rows")
    columns = (
        PLACE[0],
        rows_of,
        *PLACE[4:6],
        Column("method", "method"),
        *seeds,
        *([] if phase == "study" else [number("median", "ms", milliseconds)]),
        number("over_floor", "over floor", figure),
        *COST,
    )
    rows = [
        _cells(r, near[r.id])
        | {
            "method": r.label,
            "median": r.median,
            "seed": r.case.seed,
            "over_floor": r.median / r.floor["seconds"] if r.floor else None,
        }
        for r in found
    ]
    return as_markdown(filled(columns, rows), rows)


def _cells(result: Result, here: Sequence[Result]) -> dict:
    case = result.case
    layer = case.phase in ("forward", "backward", "model")
    return {
        **result.rates,
        "shape": shape(case),
        "N": case.N,
        "K": case.K,
        "B": case.B,
        "block": case.block,
        "sparsity": case.sparsity,
        "setting": result.setting,
        "over_dense": speed_over(result, here) if layer else None,
        "over_torch": speed_over(result, here, TORCH) if case.method == OURS and layer else None,
        "share": planning_share(here) if case.method == "plan" else None,
        "step": step_ratio(here) if case.method == "supermask" and case.phase != "study" else None,
    }


FAMILY = Family(
    "Block-sparse layers",
    "How much faster than dense is a layer that keeps a few tiles of its weight, alone and in a "
    "model, and what does it cost to learn which?",
    READING,
    {**speed.FIGURES, **accuracy.FIGURES},
    tables,
    judge=judge_all,
    readme=readme,
    full=full,
    naming=NAMING,
)
