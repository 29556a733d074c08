"""Two results side by side: how much slower or faster each case became, and whether that is real.

    python -m tools.compare OLD NEW [--markdown FILE] [--csv FILE] [--fail-slower 5%]
    python -m tools.compare OLD OLD OLD --against NEW NEW NEW

The ratio is median(NEW) / median(OLD), with a 95% interval (stats.py). A verdict needs both: the
ratio beyond the threshold and an interval that excludes 1. "same" is a finding as well: the whole
interval lies within the threshold. What is neither is "unsure". Equal samples are always "same".

Two runs of the same code differ by a few percent. With several runs a side (files of the same
cases) the medians of the runs are averaged, and the interval holds their spread. With one run on
each side it does not, so only a larger change counts.

A case that was measured in another way (another timing mode, other options under the same id) or
with fewer than six samples is not judged: its verdict is "unsure", and the note says why. A field
that only one of the files has is unknown in the other, which is no difference.

Exit codes: 0; 1 where --fail-slower found a case that is slower, missing from NEW, or not judged;
2 for a wrong input. Cases are matched by their id.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median

from tools.cases import CPU_CAVEAT, Result, Results
from tools.files import ToolError, parser, run, save
from tools.results import load
from tools.stats import (
    ALONE,
    ENOUGH,
    THRESHOLD,
    Interval,
    judge,
    ratio_of_runs,
)
from tools.tables import Column, as_csv, as_markdown, as_text, change, milliseconds, number

VERDICTS = ("slower", "faster", "unsure", "same", "missing", "new")


@dataclass(frozen=True)
class Row:
    """One case, a result a run of each side; `ratio` is new over old, None where one side has it
    not. `note` says why the case is not judged.
    """

    old: tuple[Result, ...]
    new: tuple[Result, ...]
    ratio: Interval | None
    verdict: str
    note: str = ""

    @property
    def id(self) -> str:
        return (self.old or self.new)[0].id

    @property
    def cells(self) -> dict:
        sides = {"old": self.old, "new": self.new}
        medians = {side: _median(runs) for side, runs in sides.items() if runs}
        change = self.ratio and self.ratio.value
        known = {"id": self.id, "ratio": self.ratio, "change": change, "verdict": self.verdict}
        return known | medians | {"note": self.note}


@dataclass(frozen=True)
class Comparison:
    """All cases of the runs of two sides: those of both, in reading order, then those of one."""

    old: tuple[Results, ...]
    new: tuple[Results, ...]
    rows: tuple[Row, ...]

    @property
    def both(self) -> list[Row]:
        """The rows of cases that both sides have."""
        return [row for row in self.rows if row.ratio]


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
    old: Sequence[Results],
    new: Sequence[Results],
    *,
    threshold: float | None = None,
    across_devices: bool = False,
) -> Comparison:
    """Match the cases of the runs of two sides by id and judge each.

    threshold: None is ALONE for a case with one run a side, and THRESHOLD otherwise.
    Raises ToolError when the devices differ, unless `across_devices`.
    """
    first = old[0]
    for results in (*old, *new):
        if _device(results) != _device(first) and not across_devices:
            raise ToolError(
                f"{first.files[0]} was measured on {_device(first)}, {results.files[0]} on "
                f"{_device(results)}: their times are not comparable; --across-devices compares "
                "them all the same"
            )
    before, after = _by_id(old), _by_id(new)
    rows = [_row(before.get(key, ()), after.get(key, ()), threshold) for key in before | after]
    rows.sort(key=lambda row: VERDICTS.index(row.verdict))
    return Comparison(tuple(old), tuple(new), tuple(rows))


def _by_id(side: Sequence[Results]) -> dict[str, tuple[Result, ...]]:
    """The results of each case, one a run."""
    found: dict[str, tuple[Result, ...]] = {}
    for results in side:
        for result in results.results:
            found[result.id] = (*found.get(result.id, ()), result)
    return found


def failures(comparison: Comparison, limit: float) -> list[str]:
    """Why a gate at `limit` (0.05 for 5%) fails, one line each; empty when it passes."""
    lines = [
        f"{row.id} is slower: {change(row.ratio.value)}, and {100 * limit:.4g}% is allowed"
        for row in comparison.both
        if not row.note and row.ratio.value > 1 + limit and row.ratio.low > 1
    ]
    lines += [
        f"{row.id} is missing from the new results"
        for row in comparison.rows
        if row.verdict == "missing"
    ]
    return lines + [
        f"{row.id} could not be judged: {row.note}" for row in comparison.both if row.note
    ]


def summary(comparison: Comparison) -> list[str]:
    """What the table comes to, in a few lines."""
    rows, found = comparison.both, [row.verdict for row in comparison.rows]
    lines = [", ".join(f"{found.count(name)} {name}" for name in VERDICTS) + "."]
    if not rows:
        lines.append(
            "Nothing was compared: no case is on both sides. Give two runs of the same sweep."
        )
    if rows:
        mean = geometric_mean([row.ratio.value for row in rows])
        lines.append(f"Geometric mean of new/old over {len(rows)} cases: {change(mean)}.")
        moved = sorted(max(row.ratio.value, 1 / row.ratio.value) - 1 for row in rows)
        most = moved[math.ceil(0.95 * len(moved)) - 1]
        lines.append(
            f"Half of the cases moved by at most {median(moved):.1%}, 95% by at most {most:.1%}."
        )
        together = sum((row.ratio.value > 1) == (mean > 1) for row in rows)
        if len(rows) >= 5 and together == len(rows) and abs(mean - 1) > 0.01:
            lines.append(
                "Every case moved the same way: look at clocks, power cap and versions "
                "before the code."
            )
    if len(comparison.old) == len(comparison.new) == 1:
        lines.append(
            "One run a side does not know how much two runs of the same code differ: a change "
            f"counts from {ALONE:.0%} on unless --threshold says otherwise; several runs a side "
            "(--against) measure it."
        )
    partly = [
        row.id
        for row in rows
        if (len(row.old), len(row.new)) != (len(comparison.old), len(comparison.new))
    ]
    if partly:
        lines.append(f"Not in every file: {len(partly)} cases ({partly[0]}, …).")
    lines += [f"Differs: {text}." for text in _differences(comparison.old[0], comparison.new[0])]
    if any(results.cpu for results in (*comparison.old, *comparison.new)):
        lines.append(f"{CPU_CAVEAT}.")
    return lines


def main(argv: list[str]) -> int:
    options = _options(argv)
    comparison = compare(
        [load(path) for path in options.old],
        [load(path) for path in options.new],
        threshold=options.threshold,
        across_devices=options.across_devices,
    )
    rows, lines = [row.cells for row in comparison.rows], summary(comparison)
    if options.markdown:
        names = f"{', '.join(options.old)} → {', '.join(options.new)}"
        title = f"## {names}\n\n{comparison.new[0].title}\n\n"
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


def _row(old: tuple[Result, ...], new: tuple[Result, ...], threshold: float | None) -> Row:
    if not new:
        return Row(old, new, None, "missing", "only in old")
    if not old:
        return Row(old, new, None, "new", "only in new")
    before, after = ([result.samples for result in side] for side in (old, new))
    first, *others = (_options_of(result) for result in (*old, *new))
    notes = dict.fromkeys(  # each once, in order
        f"{key}: {first[key]} → {other[key]}"
        for other in others
        for key in first
        if key in other and first[key] != other[key]
    )
    if not notes and sorted(before) == sorted(after):
        fewest = min(len(samples) for samples in before)
        return Row(old, new, Interval(1.0, 1.0, 1.0, fewest), "same")
    interval = ratio_of_runs(after, before)
    if not interval.enough:
        notes[f"{interval.samples} samples, and {ENOUGH} are needed"] = None
    if threshold is None:
        threshold = ALONE if len(old) == len(new) == 1 else THRESHOLD
    verdict = "unsure" if notes else judge(interval, threshold)
    return Row(old, new, interval, verdict, "; ".join(notes))


def _median(runs: tuple[Result, ...]) -> float:
    return geometric_mean([result.median for result in runs])


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
    command = parser("compare", __doc__, "OLD NEW, or several of OLD")
    command.add_argument("--against", metavar="NEW", nargs="+", help="several runs of NEW")
    command.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")
    command.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    command.add_argument(
        "--threshold",
        type=percentage,
        metavar="P%",
        help="a smaller change is no change (default 6%% with one run a side, else 2%%)",
    )
    command.add_argument(
        "--fail-slower",
        type=percentage,
        metavar="P%",
        help="exit with 1 when a case is slower by more than this, missing, or not judged",
    )
    command.add_argument(
        "--across-devices", action="store_true", help="compare results of different devices"
    )
    options = command.parse_args(argv)
    options.old, options.new = options.files, options.against
    if options.new is None:
        if len(options.files) != 2:
            command.error("give OLD and NEW, or several of OLD and --against several of NEW")
        options.old, options.new = options.files[:1], options.files[1:]
    for side in (options.old, options.new):
        if len({Path(path).resolve() for path in side}) < len(side):
            command.error("a file is given twice on one side: it is one run")
    return options


if __name__ == "__main__":
    run(main)
