"""What linear layers show: figures in the order of the report, tables, and how to read them."""

import functools

from tools.case_table import case_table
from tools.cases import Results
from tools.families.linear.choices import choices_table
from tools.families.linear.costs import (
    errors_vs_size,
    memory_vs_size,
    quality_speed_vs_size,
    time_per_weight_byte_vs_size,
)
from tools.families.linear.hypotheses import beats_dense, judge_all
from tools.families.linear.naming import NAMING
from tools.families.linear.opponents import usual_name
from tools.families.linear.readme_tables import full, readme
from tools.families.linear.regions import less_layout_fix_vs_size, regions_vs_size
from tools.families.linear.speed import over_dense, over_floor
from tools.families.linear.steps import drift_by_step, step_breakdown
from tools.family import TIMES, Family
from tools.stats import THRESHOLD
from tools.tables import Column, Table, number

READING = (
    *TIMES,
    (
        "A name",
        "such as block_shock · 1100 · cusparselt · exchange tells the mask, the kernel of the "
        "product and the way of summing over ranks (reduce), each only where it is not what the "
        "method uses when nothing is asked. path in the tables says which code ran.",
    ),
    (
        "dense TP",
        "is the faster of dense_tp_row and dense_tp_column. Block-Shock has two such opponents: "
        "dense TP as users run it, summed by the library's collective (NCCL on GPUs), and dense TP "
        "with the same sum as Block-Shock. Ratios are of time: below 1 the first method named is "
        "the faster.",
    ),
    (
        "block_shock",
        "is what the hypotheses are about: 2:4 kernels. block_shock_folded is the fixed pattern "
        "computed as a dense product of its kept columns, and stands beside it.",
    ),
)
FIGURES = {
    "forward_vs_N": functools.partial(over_dense, phase="forward"),
    "forward_vs_B": functools.partial(over_dense, phase="forward", x="B"),
    "forward_over_floor": functools.partial(over_floor, phase="forward"),
    "forward_regions_vs_N": regions_vs_size,
    "backward_vs_N": functools.partial(over_dense, phase="backward"),
    "training_vs_N": functools.partial(over_dense, phase="training"),
    "training_over_floor": functools.partial(over_floor, phase="training"),
    "step_breakdown": step_breakdown,
    "memory_vs_N": memory_vs_size,
    # For the last page: asked for, and a check of what is told above.
    "forward_less_layout_fix_vs_N": less_layout_fix_vs_size,
    "forward_per_weight_byte_vs_N": time_per_weight_byte_vs_size,
    "quality_adjusted_speed_vs_N": quality_speed_vs_size,
    "errors_vs_N": errors_vs_size,
    "drift": drift_by_step,
}


WHERE = (
    number("N", "N"),
    number("B", "B"),
    Column("mask", "mask"),
    Column("optimizer", "optimizer"),
)
TITLES = {
    "correctness": "Correctness: output and all gradients against the truth",
    "forward": "Forward",
    "backward": "Backward: forward and the gradient of the input, weights frozen",
    "training": "Training: one step",
    "drift": "Drift: T forward-only steps",
}


def tables(results: Results) -> list[Table]:
    """Speed at every N and B, what "auto" chose, then every case, phase by phase."""
    made = [speed_table(results), choices_table(results)]
    phases = [result.case.phase for result in results.results]
    for phase in [p for p in TITLES if p in phases] + sorted(set(phases) - set(TITLES)):
        found = [result for result in results.results if result.case.phase == phase]
        title = TITLES.get(phase, phase)
        made.append(case_table(title, found, WHERE, example="block_shock 4096"))
    return [table for table in made if table.rows]


def speed_table(results: Results) -> Table:
    """Lines and N down, B across: above 1 Block-Shock is faster."""
    usual = usual_name(results)
    note = (
        f"Time of {usual}, the faster of dense_tp_row and dense_tp_column, over that of the line: "
        "above 1 the line is faster. An asterisk marks a difference of less than "
        f"{100 * THRESHOLD:g}%, or one that the samples do not show with 95% confidence."
    )
    rows: dict[tuple, dict] = {}
    found = [j for j in beats_dense(results, THRESHOLD).judgements if j.opponent == usual]
    for judgement in found:
        for point in sorted(judgement.points, key=lambda point: point.N):
            row = rows.setdefault((point.of, point.N), {"line": point.of, "N": point.N})
            mark = "" if point.verdict in ("faster", "slower") else "*"
            row[f"B{point.B}"] = f"{1 / point.ratio.value:.2f}{mark}"
    batches = sorted({point.B for judgement in found for point in judgement.points})
    columns = [Column("line", "line"), number("N", "N")]
    columns += [number(f"B{b}", f"B = {b}") for b in batches]
    title = f"Forward: speed against {usual}"
    return Table(title, columns, list(rows.values()), "rows", example="block_shock", note=note)


FAMILY = Family(
    "Linear layers",
    "When does a dense layer, held as a sum of 2:4-sparse terms on several GPUs, beat the ordinary "
    "ways of splitting it?",
    READING,
    FIGURES,
    tables,
    judge_all,
    readme,
    full,
    NAMING,
)
