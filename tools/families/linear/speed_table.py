"""Speed of the forward against the better dense TP at every N and B, one table for each line."""

from tools.cases import Results
from tools.families.linear.hypotheses import beats_dense
from tools.families.linear.opponents import BETTER
from tools.stats import THRESHOLD
from tools.tables import Table, number


def speed_tables(results: Results) -> list[Table]:
    """N down, B across: time of the better dense TP over Block-Shock's, above 1 it is faster."""
    note = (
        "Time of the better of dense_tp_row and dense_tp_column, with their usual reduce, over "
        "that of the method: above 1 it is faster. An asterisk marks a difference of less than "
        f"{100 * THRESHOLD:g}%, or one that the samples do not show with 95% confidence."
    )
    tables = []
    for finding in beats_dense(results, THRESHOLD):
        if finding.points and finding.against == BETTER:
            batches = sorted({point.B for point in finding.points})
            rows: dict[int, dict] = {}
            for point in sorted(finding.points, key=lambda point: point.N):
                mark = "" if point.verdict in ("faster", "slower") else "*"
                text = f"{1 / point.ratio.value:.2f}{mark}"
                rows.setdefault(point.N, {"N": point.N})[str(point.B)] = text
            columns = [number("N", "N"), *(number(str(b), f"B = {b}") for b in batches)]
            title = f"Forward speed: {finding.method} over the better dense TP, {finding.setting}"
            tables.append(Table(title, columns, list(rows.values()), "sizes", note=note))
    return tables
