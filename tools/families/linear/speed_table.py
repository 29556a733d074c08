"""Speed of the forward against the better dense TP at every N and B."""

from tools.cases import Results
from tools.families.linear.hypotheses import beats_dense
from tools.families.linear.opponents import usual_name
from tools.stats import THRESHOLD
from tools.tables import Column, Table, number


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
