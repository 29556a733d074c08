"""What a reader sees of vector sums: a figure, a table, a hypothesis and the README's table."""

from tools.cases import Case, Naming, Result, Results, over
from tools.drawing import series, style
from tools.drawing.chart import Axis, Drawing
from tools.drawing.series import Words
from tools.family import Family, Written
from tools.judged import FAILS, HOLDS, UNDECIDED, Judgement, Verdict, sentence
from tools.stats import judge
from tools.tables import Column, Table, as_markdown, milliseconds, number

METHODS = {"plain": ("#0072b2", "o"), "halves": ("#d55e00", "o")}  # colours and markers
STATUS = {"slower": HOLDS, "faster": FAILS, "same": FAILS}
COLUMNS = (
    Column("method", "method"),
    number("n", "n"),
    number("median", "median ms", milliseconds),
)


def forward_vs_n(results: Results) -> list[Drawing]:
    """Times of one sum against n."""
    settings = style.settings(results.of("forward"), "forward")
    groups = {text: [series.Sketch("", "n", found)] for text, found in settings.items()}
    words = Words("vector_sum_vs_n", "Sums: time against n", "Medians. Lower is better.")
    return series.charts(
        results,
        groups,
        words,
        Axis("ms", "{:.3g}".format),
        lambda result: 1e3 * result.median,
    )


def tables(results: Results) -> list[Table]:
    """Every sum."""
    return [Table("Vector sums", COLUMNS, [_row(result) for result in results.results])]


def judge_all(results: Results, threshold: float) -> list[Verdict]:
    """Whether halves are slower, at each n."""
    found = {(r.case.method, r.case.n, r.setting): r for r in results.of("forward")}
    judgements = []
    for (method, n, where), result in found.items():
        if method == "halves" and ("plain", n, where) in found:
            ratio = over(result, found["plain", n, where])
            status = STATUS.get(judge(ratio, threshold), UNDECIDED)
            line = f"n = {n} ({where})"
            judgements.append(Judgement(line, "plain", status, f"time ratio {ratio}"))
    words = sentence(judgements, "both methods at one n")
    return [Verdict("S1", "A sum in two halves is slower.", words, tuple(judgements))]


def readme(results: Results) -> Written | None:
    """The table of sums."""
    rows = [_row(result) for result in results.of("forward")]
    return Written("Sums of vectors.", "", as_markdown(COLUMNS, rows)) if rows else None


def setting(case: Case) -> str:
    """dtype, and the scale where it is not the usual one."""
    return case.dtype + (f", scale {case.scale}" if case.scale != "one" else "")


def _row(result: Result) -> dict:
    return {"method": result.label, "n": result.case.n, "median": result.median}


FAMILY = Family(
    "Vector sums",
    "Is a sum in two halves slower than one sum?",
    (("n", "is the length of a vector."),),
    {"vector_sum_vs_n": forward_vs_n},
    tables,
    judge=judge_all,
    readme=readme,
    full=lambda results: [readme(results)],
    naming=Naming(methods=METHODS, phases=("forward", "twice"), sizes=("n",), setting=setting),
)
