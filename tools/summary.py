"""The README's results table and verdicts, from the results themselves.

    python -m tools.summary FILE... [--readme README.md] [--check]

Writes what stands between the lines <!-- results:begin --> and <!-- results:end -->, and nothing
else, so that no number there is typed by hand. Without --readme the table is printed. --check
writes nothing and exits with 1 where the README is not what these results give.
"""

import argparse

from tools.cases import CPU_CAVEAT, METHODS, Result, Results, interleaved, method_order
from tools.figures.style import Absent, settings
from tools.files import ToolError, read_text, run, save
from tools.hypotheses import DENSE, SHOCKS, judge_all
from tools.results import load_all
from tools.stats import Interval, ratio
from tools.tables import as_markdown, milliseconds, number

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
REFERENCE = DENSE[0]


def table(results: Results) -> str:
    """Caption, Markdown table (forward time of each method, ratios to dense_tp_row), verdicts."""
    try:
        groups = settings(results.of("forward"), "forward")
    except Absent as reason:
        raise ToolError(f"{results.files[0]} has {reason}: there is nothing to tabulate") from None
    text, found = next(iter(groups.items()))
    # Of several masks the usual one stands for its method.
    found = [result for result in found if result.label == result.case.method] or found
    methods = sorted({result.label for result in found}, key=method_order)
    compared = [m for m in methods if m.startswith(SHOCKS) or m not in METHODS]
    columns = [number("N", "N"), number("B", "B")]
    columns += [number(method, method, milliseconds) for method in methods]
    if REFERENCE in methods:
        columns += [number(f"{m}/", f"{m} / {REFERENCE}", _interval) for m in compared]
    rows = []
    for n, b in sorted({(result.case.N, result.case.B) for result in found}):
        here = {r.label: r for r in found if (n, b) == (r.case.N, r.case.B)}
        row: dict = {"N": n, "B": b} | {label: r.median for label, r in here.items()}
        if REFERENCE in here:
            row |= {f"{m}/": _over(here[m], here[REFERENCE]) for m in compared if m in here}
        rows.append(row)
    verdicts = [
        f"- **{verdict.name} {verdict.status}**: *{verdict.claim}* {_sentence(verdict.headline)}"
        for verdict in judge_all(results)
    ]
    parts = [_caption(results, text), as_markdown(columns, rows), "\n".join(verdicts)]
    return "\n\n".join(part.strip() for part in parts)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def replaced(readme: str, content: str, path: str) -> str:
    """`readme` with `content` between the markers; ToolError unless each is there once in order."""
    for mark in (BEGIN, END):
        if readme.count(mark) != 1:
            raise ToolError(
                f"{path} has {readme.count(mark)} lines {mark}, and one is needed: "
                f"put {BEGIN} and {END} where the table belongs"
            )
    if readme.index(BEGIN) > readme.index(END):
        raise ToolError(f"{path} has {END} before {BEGIN}: exchange them")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def _caption(results: Results, text: str) -> str:
    dates = sorted({date[:10] for date in results.dates if date})
    facts = [results.device, text, results.versions, ", ".join(dates)]
    caption = "Forward, median ms of device time. Ratios below 1: faster than " + REFERENCE
    caption += ", with their 95% intervals. " + "; ".join(fact for fact in facts if fact) + "."
    return f"**{CPU_CAVEAT}.** {caption}" if results.cpu else caption


def _over(result: Result, reference: Result) -> Interval:
    paired = interleaved([result, reference])
    return ratio(result.samples, reference.samples, paired=paired)


def _interval(interval: Interval) -> str:
    if not interval.enough:
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.summary", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--readme", metavar="FILE", help="the file whose table is written")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args(argv)
    if options.check and not options.readme:
        raise ToolError("--check needs --readme FILE: it says whether that file is up to date")
    content = table(load_all(options.files))
    if not options.readme:
        print(content)
        return 0
    readme = read_text(options.readme)
    new = replaced(readme, content, options.readme)
    if options.check:
        print(f"{options.readme} is {'up to date' if new == readme else 'out of date'}")
        return 0 if new == readme else 1
    if new != readme:
        save(options.readme, new)
    print(f"{options.readme} has the table of {', '.join(options.files)}")
    return 0


if __name__ == "__main__":
    run(main)
