"""The verdict on the hypotheses of the families that were measured.

    python -m tools.verdict FILE... [--all] [--out DIR]

Prints for each hypothesis the claim, where it holds in a sentence, and a line for each mask and
opponent with its own status. --all adds every point with its 95% interval, and what was measured
beside the hypothesis. --out writes verdict.md (as printed) and verdict.json (everything).
What a status needs is in the family's hypotheses.py. The exit code says nothing about the
hypotheses: 0, or 2 for a wrong input.
"""

import dataclasses
import json
from pathlib import Path
from textwrap import indent
from typing import Any

from tools.cases import CPU_CAVEAT, Results
from tools.compare import percentage
from tools.families import held
from tools.files import parser, run, save
from tools.judged import Judgement, Verdict
from tools.results import load_all
from tools.stats import THRESHOLD
from tools.tables import as_markdown, as_text

NO_GPU = f"{CPU_CAVEAT}. The statuses below are those of this CPU run."
NOTHING = "Nothing to judge: these results are of no family that has a hypothesis."


def judged(results: Results, threshold: float = THRESHOLD) -> list[Verdict]:
    """The verdicts of every family that the results hold."""
    return [
        verdict
        for family, own in held(results).values()
        if family.judge
        for verdict in family.judge(own, threshold)
    ]


def line(judgement: Judgement) -> str:
    """A judgement in one line."""
    return f"{judgement.title}: {judgement.status}, {judgement.words}"


def written(
    verdicts: list[Verdict], results: Results, every: bool = False, *, markdown: bool = False
) -> str:
    """The verdicts as terminal text or Markdown; `every` adds points and what stands beside."""
    said = NOTHING if not verdicts else NO_GPU if results.cpu else ""
    lines = ["# Verdict", ""] * markdown + [results.title] + ["", said] * bool(said) + [""]
    mark, margin = ("- ", "") if markdown else ("", " " * 4)
    for verdict in verdicts:
        head = (
            f"## {verdict.name}: {verdict.claim}\n"
            if markdown
            else f"{verdict.name}  {verdict.claim}"
        )
        lines += [head, margin + verdict.sentence, ""]
        for judgement in verdict.judgements if every else verdict.deciding:
            beside = "" if judgement.decides else "beside: "
            lines.append(f"{margin}{mark}{beside}{line(judgement)}")
            if every and judgement.points:
                table = verdict.table(judgement)
                if markdown:
                    lines += ["", as_markdown(table.columns, table.rows), "", table.words, ""]
                else:
                    text = f"{as_text(table.columns, table.rows)}\n{table.words}"
                    lines += [indent(text, 2 * margin).rstrip(), ""]
        if verdict.beside and not every and not markdown:
            lines.append(f"{margin}beside it: {len(verdict.beside)} more lines, with --all")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def as_data(verdicts: list[Verdict], results: Results) -> dict:
    """The verdicts as plain data for JSON; what a point lacks is left out, six digits are
    kept."""
    return {
        "schema": 2,
        "files": list(results.files),
        "device": results.device,
        "caveat": CPU_CAVEAT if results.cpu else None,
        "hypotheses": [
            {name: _plain(value) for name, value in vars(verdict).items() if name != "columns"}
            for verdict in verdicts
        ],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {name: _plain(item) for name, item in vars(value).items() if item is not None}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(argv: list[str]) -> int:
    command = parser("verdict", __doc__)
    command.add_argument("--all", action="store_true", help="every point, and what stands beside")
    command.add_argument(
        "-o", "--out", metavar="DIR", help="write verdict.md and verdict.json here"
    )
    command.add_argument(
        "--threshold",
        type=percentage,
        default=THRESHOLD,
        metavar="P%",
        help="a smaller difference is none (default 2%%)",
    )
    options = command.parse_args(argv)
    results = load_all(options.files)
    verdicts = judged(results, options.threshold)
    if options.out:
        folder, data = Path(options.out), as_data(verdicts, results)
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
        save(folder / "verdict.json", f"{text}\n")
        save(folder / "verdict.md", written(verdicts, results, options.all, markdown=True))
    for note in results.notes:
        print(f"note: {note}")
    print(written(verdicts, results, options.all), end="")
    return 0


if __name__ == "__main__":
    run(main)
