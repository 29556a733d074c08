"""The verdict on the three hypotheses, from measured results.

    python -m tools.verdict FILE... [--out DIR] [--json FILE]

Prints, for H1, H2 and H3, whether it holds, fails or is undecided, where, by how much, and every
point with its 95% interval. What each status needs is in hypotheses.py. --out writes the same to
verdict.md and verdict.json. The exit code says nothing about the hypotheses: 0, or 2 for a wrong
input.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tools.cases import CPU_CAVEAT, Results
from tools.compare import percentage
from tools.families.linear.hypotheses import SMALL_UPKEEP, Finding, Verdict, judge_all
from tools.files import run, save
from tools.results import load_all
from tools.stats import THRESHOLD
from tools.tables import Column, as_markdown, as_text, number, percent

NO_GPU = f"{CPU_CAVEAT}. The statuses below are those of this CPU run."
NOTHING = (
    "Nothing to judge: the hypotheses are about linear layers, and these results are of attention."
)


def columns(finding: Finding) -> tuple[Column, ...]:
    """The columns that the points of a finding fill."""
    shown = [
        number("N", "N"),
        number("B", "B"),
        number("ratio", "time ratio [95%]"),
        Column("verdict", "verdict"),
    ]
    if len({point.against for point in finding.points}) > 1:
        shown.append(Column("against", "against"))
    if any(point.change is not None for point in finding.points):
        shown[3:3] = [
            number("forward", "in the forward [95%]"),
            number("change", "change [95%]"),
            number("upkeep", "upkeep", percent),
            number("without_upkeep", "without upkeep", lambda value: f"{value:.3f}"),
        ]
    if any(point.note for point in finding.points):
        shown.append(Column("note", "note"))
    return tuple(shown)


def rows(finding: Finding) -> list[dict]:
    """The points of a finding as rows of a table."""
    return [{name: getattr(p, name) for name in p.__dataclass_fields__} for p in finding.points]


def title(finding: Finding) -> str:
    """A finding's line: which method, where, against what, and its status."""
    beside = "" if finding.main else " (beside the hypothesis)"
    where = f" ({finding.setting})" if finding.setting else ""
    return f"{finding.method}{where} against {finding.against}{beside}: {finding.status}"


def as_plain(verdicts: list[Verdict], results: Results) -> str:
    """The verdicts as terminal text."""
    lines = [results.title, ""]
    if not verdicts:
        lines += [NOTHING, ""]
    elif results.cpu:
        lines += [NO_GPU, ""]
    for verdict in verdicts:
        here = " on this CPU" if results.cpu else ""
        lines += [f"{verdict.name}  {verdict.status.upper()}{here}: {verdict.claim}"]
        lines += [f"    {verdict.headline}", ""]
        for finding in verdict.findings:
            lines += [f"    {title(finding)}", f"        {finding.text}"]
            if finding.points:
                table = as_text(columns(finding), rows(finding))
                lines += [f"        {line}" for line in table.splitlines()]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def as_page(verdicts: list[Verdict], results: Results) -> str:
    """The verdicts as Markdown."""
    lines = ["# Verdict", "", results.title, ""]
    if not verdicts:
        lines += [NOTHING, ""]
    elif results.cpu:
        lines += [f"**{NO_GPU}**", ""]
    for verdict in verdicts:
        here = " on this CPU" if results.cpu else ""
        lines += [f"## {verdict.name}: {verdict.status}{here}", "", f"*{verdict.claim}*", ""]
        lines += [verdict.headline, ""]
        for finding in verdict.findings:
            lines += [f"### {title(finding)}", "", finding.text, ""]
            if finding.points:
                lines += [as_markdown(columns(finding), rows(finding)), ""]
    return "\n".join(lines)


def as_data(verdicts: list[Verdict], results: Results) -> dict:
    """The verdicts as plain data for JSON."""
    return {
        "schema": 1,
        "files": list(results.files),
        "device": results.device,
        "caveat": CPU_CAVEAT if results.cpu else None,
        "hypotheses": [asdict(verdict) for verdict in verdicts],
    }


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    options = _options(argv)
    results = load_all(options.files)
    verdicts = judge_all(results, threshold=options.threshold, small_upkeep=options.small_upkeep)
    data = json.dumps(as_data(verdicts, results), indent=1, ensure_ascii=False) + "\n"
    if options.json:
        save(options.json, data)
    if options.out:
        save(Path(options.out) / "verdict.json", data)
        save(Path(options.out) / "verdict.md", as_page(verdicts, results))
    for note in results.notes:
        print(f"note: {note}")
    print(as_plain(verdicts, results), end="")
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.verdict", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("-o", "--out", metavar="DIR", help="write verdict.md and verdict.json here")
    parser.add_argument("--json", metavar="FILE", help="write the verdict as JSON")
    parser.add_argument(
        "--threshold",
        type=percentage,
        default=THRESHOLD,
        metavar="P%",
        help="a smaller difference is none (default 2%%)",
    )
    parser.add_argument(
        "--small-upkeep",
        type=percentage,
        default=SMALL_UPKEEP,
        metavar="P%",
        help="upkeep up to this share of a step is small (default 5%%)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
