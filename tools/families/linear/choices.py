"""How good `auto` is: beside every kernel and sum that was asked for by name, at the same size."""

from tools.cases import Result, Results, fastest, grouped, over
from tools.families.linear.naming import setting
from tools.tables import Column, Table, milliseconds, number

COLUMNS = (
    number("N", "N"),
    number("B", "B"),
    Column("layer", "layer"),
    number("auto", "auto ms", lambda result: milliseconds(result.median)),
    Column("took", "auto took"),
    number("best", "best by name ms", lambda result: milliseconds(result.median)),
    Column("named", "best by name"),
    number("ratio", "auto / best by name"),
)
NOTE = (
    "Forward. Best by name: the fastest of all kernels and sums that were asked for by name; there "
    "an exchange chooses the number of its chunks."
)


def choices_table(results: Results) -> Table:
    """A row for each layer and size that was measured with `auto` and with several sums by name."""

    def layer(result: Result) -> tuple:
        case = result.case
        return (case.N, case.B, case.method, case.mask or "", setting(case))

    rows = []
    for (n, b, *words), found in sorted(grouped(results.of("forward"), layer).items()):
        chosen = [(r, {r.case.kernel, r.case.reduce} - {None}) for r in found]
        auto = next((r for r, asked in chosen if asked == {"auto"}), None)
        named = [r for r, asked in chosen if asked and "auto" not in asked]
        if auto is None or len({r.case.reduce for r in named}) < 2:
            continue
        best = fastest(named)
        asked = [value for value in (best.case.kernel, best.case.reduce) if value]
        took = [auto.paths.get(name, "") for name in ("forward", "reduce")]
        rows.append(
            {"N": n, "B": b, "layer": " · ".join(word for word in words if word), "auto": auto}
            | {"took": "; ".join(filter(None, took)), "best": best, "named": ", ".join(asked)}
            | {"ratio": over(auto, best)}
        )
    return Table("Forward: auto beside every kernel and sum", COLUMNS, rows, "rows", note=NOTE)
