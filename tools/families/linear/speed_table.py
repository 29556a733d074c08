"""Speed of the forward against the better dense TP at every N and B."""

from tools.cases import Results
from tools.families.linear.hypotheses import beats_dense
from tools.families.linear.opponents import BETTER
from tools.stats import THRESHOLD
from tools.tables import Column, Table, number


def speed_table(results: Results) -> Table:
    """Methods and N down, B across: above 1 Block-Shock is faster."""
    note = (
        "Time of the better of dense_tp_row and dense_tp_column, with their usual reduce, over "
        "that of the method: above 1 it is faster. An asterisk marks a difference of less than "
        f"{100 * THRESHOLD:g}%, or one that the samples do not show with 95% confidence."
    )
    rows: dict[tuple, dict] = {}
    findings = [f for f in beats_dense(results, THRESHOLD) if f.against == BETTER]
    for finding in findings:
        for point in sorted(finding.points, key=lambda point: point.N):
            key = (finding.method, finding.setting, point.N)
            row = rows.setdefault(key, dict(zip(("method", "setting", "N"), key, strict=True)))
            mark = "" if point.verdict in ("faster", "slower") else "*"
            row[f"B{point.B}"] = f"{1 / point.ratio.value:.2f}{mark}"
    batches = sorted({point.B for finding in findings for point in finding.points})
    columns = [Column("method", "method"), Column("setting", "setting"), number("N", "N")]
    columns += [number(f"B{b}", f"B = {b}") for b in batches]
    title = "Forward: speed against the better dense TP"
    return Table(title, columns, list(rows.values()), "rows", example="block_shock", note=note)
