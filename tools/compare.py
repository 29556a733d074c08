"""Two results side by side: how much slower or faster each case became, and whether that is real.

    python -m tools.compare OLD NEW [--markdown FILE] [--csv FILE] [--fail-slower 5%]

The ratio is median(NEW) / median(OLD), with a 95% interval (stats.py). A verdict needs both: the
ratio beyond the threshold and an interval that excludes 1. "same" is a finding as well: the whole
interval lies within the threshold. What is neither is "unsure".

A case that was measured in another way (another timing mode, other options under the same id) or
with fewer than six samples is not judged: its verdict is "unsure", and the note says why. A field
that only one of the files has is unknown in the other, which is no difference.

Exit codes: 0; 1 where --fail-slower found a case that is slower, missing from NEW, or not judged;
2 for a wrong input. Cases are matched by their id.
"""

import argparse
import math
from dataclasses import dataclass

from tools.cases import CPU_CAVEAT, Result, Results
from tools.files import ToolError, run, save
from tools.results import load
from tools.stats import ENOUGH, THRESHOLD, Interval, judge, ratio
from tools.tables import Column, as_csv, as_markdown, as_text, change, milliseconds, number

VERDICTS = ("slower", "faster", "unsure", "same")


@dataclass(frozen=True)
class Row:
    """One case of both files; `ratio` is new over old. `judged` is false where `note` says why."""

    old: Result
    new: Result
    ratio: Interval
    verdict: str
    note: str = ""

    @property
    def judged(self) -> bool:
        """Whether the two measurements could be compared at all."""
        return not self.note


@dataclass(frozen=True)
class Comparison:
    """All cases of two results: those in both, in reading order, and those in one only."""

    old: Results
    new: Results
    rows: tuple[Row, ...]
    missing: tuple[Result, ...]
    added: tuple[Result, ...]


COLUMNS = (
    Column("id", "case"),
    number("old", "old ms", milliseconds),
    number("new", "new ms", milliseconds),
    number("ratio", "new/old [95%]"),
    number("change", "change", change),
    Column("verdict", "verdict"),
    Column("note", "note"),
)


def compare(
    old: Results, new: Results, *, threshold: float = THRESHOLD, across_devices: bool = False
) -> Comparison:
    """Match the cases of two results by id and judge each.

    Raises ToolError when the devices differ, unless `across_devices`.
    """
    if _device(old) != _device(new) and not across_devices:
        raise ToolError(
            f"{old.files[0]} was measured on {_device(old)}, {new.files[0]} on {_device(new)}: "
            "their times are not comparable; --across-devices compares them all the same"
        )
    before = {result.id: result for result in old.results}
    after = {result.id: result for result in new.results}
    rows = [_row(before[key], after[key], threshold) for key in before if key in after]
    return Comparison(
        old,
        new,
        tuple(sorted(rows, key=lambda row: VERDICTS.index(row.verdict))),
        tuple(result for key, result in before.items() if key not in after),
        tuple(result for key, result in after.items() if key not in before),
    )


def failures(comparison: Comparison, limit: float) -> list[str]:
    """Why a gate at `limit` (0.05 for 5%) fails, one line each; empty when it passes."""
    slower = [
        row
        for row in comparison.rows
        if row.judged and row.ratio.value > 1 + limit and row.ratio.low > 1
    ]
    lines = [
        f"{row.old.id} is slower: {change(row.ratio.value)}, and {100 * limit:.4g}% is allowed"
        for row in slower
    ]
    lines += [f"{result.id} is missing from the new results" for result in comparison.missing]
    lines += [
        f"{row.old.id} could not be judged: {row.note}" for row in comparison.rows if not row.judged
    ]
    return lines


def as_rows(comparison: Comparison) -> list[dict]:
    """The rows of the table, missing and new cases included."""
    rows: list[dict] = [
        {
            "id": row.old.id,
            "old": row.old.median,
            "new": row.new.median,
            "ratio": row.ratio,
            "change": row.ratio.value,
            "verdict": row.verdict,
            "note": row.note,
        }
        for row in comparison.rows
    ]
    rows += [
        {"id": result.id, "old": result.median, "verdict": "missing", "note": "only in old"}
        for result in comparison.missing
    ]
    rows += [
        {"id": result.id, "new": result.median, "verdict": "new", "note": "only in new"}
        for result in comparison.added
    ]
    return rows


def summary(comparison: Comparison) -> list[str]:
    """What the table comes to, in a few lines."""
    rows = comparison.rows
    counts = [f"{sum(row.verdict == name for row in rows)} {name}" for name in VERDICTS]
    counts += [f"{len(comparison.missing)} missing", f"{len(comparison.added)} new"]
    lines = [", ".join(counts) + "."]
    if rows:
        mean = math.exp(sum(math.log(row.ratio.value) for row in rows) / len(rows))
        lines.append(f"Geometric mean of new/old over {len(rows)} cases: {change(mean)}.")
        together = sum((row.ratio.value > 1) == (mean > 1) for row in rows)
        if len(rows) >= 5 and together == len(rows) and abs(mean - 1) > 0.01:
            lines.append(
                "Every case moved the same way: look at clocks, power cap and versions "
                "before the code."
            )
    lines += [f"Differs: {text}." for text in _differences(comparison.old, comparison.new)]
    if comparison.old.cpu or comparison.new.cpu:
        lines.append(f"{CPU_CAVEAT}.")
    return lines


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    options = _options(argv)
    comparison = compare(
        load(options.old),
        load(options.new),
        threshold=options.threshold,
        across_devices=options.across_devices,
    )
    rows, lines = as_rows(comparison), summary(comparison)
    if options.markdown:
        title = f"## {options.old} → {options.new}\n\n{comparison.new.title}\n\n"
        text = title + as_markdown(COLUMNS, rows) + "\n\n" + "\n\n".join(lines) + "\n"
        save(options.markdown, text)
    if options.csv:
        save(options.csv, as_csv(COLUMNS, rows))
    print(as_text(COLUMNS, rows))
    print("\n" + "\n".join(lines))
    if options.fail_slower is None:
        return 0
    failed = failures(comparison, options.fail_slower)
    for line in failed:
        print(f"FAIL: {line}")
    return 1 if failed else 0


def _row(old: Result, new: Result, threshold: float) -> Row:
    interval = ratio(new.samples, old.samples)
    notes = []
    before, after = (_options_of(result) for result in (old, new))
    notes += [
        f"{key}: {before[key]} → {after[key]}"
        for key in before
        if key in after and before[key] != after[key]
    ]
    if not interval.enough:
        notes.append(f"{interval.samples} samples, and {ENOUGH} are needed")
    verdict = "unsure" if notes else judge(interval, threshold)
    return Row(old, new, interval, verdict, "; ".join(notes))


def _options_of(result: Result) -> dict:
    """What was asked for, as far as the file says; a seed only tells which bits were used."""
    case = result.case
    known = {"family": case.family, "phase": case.phase, "method": case.method, **case.fields}
    found = {key: known[key] for key in sorted(known.keys() - {"seed"})}
    timing = {f"timing {key}": result.timing.get(key) for key in ("mode", "l2")}
    return found | {key: value for key, value in timing.items() if value is not None}


def _device(results: Results) -> str:
    # All CPUs call themselves by their ranks; the processor tells them apart.
    cpu = f", {results.machine['cpu']}" if results.cpu and results.machine.get("cpu") else ""
    return results.device + cpu


def _differences(old: Results, new: Results) -> list[str]:
    names = ("device", "cpu", "power_limit_w", "torch", "cuda", "nccl", "cusparselt", "triton")
    names += ("driver", "version")
    return [
        f"{name} {old.machine.get(name)} → {new.machine.get(name)}"
        for name in names
        if old.machine.get(name) != new.machine.get(name)
    ]


def percentage(text: str) -> float:
    """ "2%", "2.5" or "2.5%" as 0.02 or 0.025; fractions of a percent are taken."""
    try:
        value = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage; give one like 5% or 2.5%")
    return value


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    parser.add_argument(
        "--threshold",
        type=percentage,
        default=THRESHOLD,
        metavar="P%",
        help="a smaller change is no change (default 2%%)",
    )
    parser.add_argument(
        "--fail-slower",
        type=percentage,
        metavar="P%",
        help="exit with 1 when a case is slower by more than this, missing, or not judged",
    )
    parser.add_argument(
        "--across-devices", action="store_true", help="compare results of different devices"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
