"""How the hybrid block scales over ranks: a table from result files of several numbers of ranks.

    python -m tools.families.transformer.scaling FILE...

With t(R, b) the time of b sequences on R ranks, and Q the fewest ranks that were measured:

    strong   Q t(Q, b) / (R t(R, b))         the same work on more ranks; 100% where all of it helps
    weak     t(Q, b Q / R) / t(R, b)         the same work for each rank

Files of different machines are put together, which is meant: GPUs of one kind, in hosts of 1 to 8.
"""

from collections.abc import Iterable, Sequence

from tools.cases import Result, grouped
from tools.families.transformer.hybrid import HYBRID
from tools.families.transformer.points import plan_words
from tools.files import ToolError, parser, run
from tools.results import load
from tools.stats import Interval, combine
from tools.tables import Column, as_markdown, interval, milliseconds, number

COLUMNS = (
    Column("phase", "phase"),
    number("width", "width"),
    number("T", "T"),
    Column("attention", "attention"),
    number("batch", "batch"),
    number("ranks", "ranks"),
    number("median", "ms", milliseconds),
    number("strong", "strong", interval),
    number("weak", "weak", interval),
)
SAME = ("width", "heads", "T", "dtype", "causal", "compiled", "reduce", "seed")


def rows(results: Iterable[Result]) -> list[dict]:
    """A row for each result of the block; `strong` and `weak` are Intervals, or None."""
    found = [r for r in results if r.case.phase in HYBRID]
    found.sort(key=_order)
    made = []
    for group in grouped(found, _what).values():
        made += [_row(result, group) for result in group]
    return made


def _what(result: Result) -> tuple:
    """Equal for what differs in ranks and batch alone."""
    case = result.case
    return (case.phase, case.method, case.pattern, *(getattr(case, name) for name in SAME))


def _order(result: Result) -> tuple:
    case = result.case
    return (case.phase, case.width, case.T, result.line_order, case.batch, case.ranks)


def _row(result: Result, group: Sequence[Result]) -> dict:
    case = result.case
    times = {(r.case.ranks, r.case.batch): r for r in group}
    fewest = min(r.case.ranks for r in group)
    same = times.get((fewest, case.batch))
    share, rest = divmod(case.batch * fewest, case.ranks)
    smaller = times.get((fewest, share)) if not rest else None
    return {
        "phase": HYBRID[case.phase],
        "width": case.width,
        "T": case.T,
        "attention": plan_words(result),
        "batch": case.batch,
        "ranks": case.ranks,
        "median": result.median,
        "strong": _efficiency(same, result, fewest / case.ranks),
        "weak": _efficiency(smaller, result, 1.0),
    }


def _efficiency(first: Result | None, result: Result, share: float) -> Interval | None:
    if first is None or first is result:
        return None
    return combine(lambda t, own: share * t / own, [first.samples, result.samples])


def main(argv: list[str]) -> int:
    command = parser("families.transformer.scaling", __doc__)
    options = command.parse_args(argv)
    loaded = [load(path) for path in options.files]
    made = rows(result for results in loaded for result in results.results)
    if len({row["ranks"] for row in made}) < 2:
        raise ToolError(
            f"{', '.join(options.files)}: scaling needs the hybrid block on two numbers of ranks; "
            "measure bench/bench_hybrid.py with --ranks 1, 2, …"
        )
    print(", ".join(dict.fromkeys(results.title for results in loaded)))
    print(as_markdown(COLUMNS, made))
    return 0


if __name__ == "__main__":
    run(main)
