"""Tables: the same columns and rows as terminal text, Markdown, CSV or in a page.

A row is a dict; a column picks a key and says how its value is written. Text, Markdown and
pages carry the written value, CSV the value itself, to the last digit.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.stats import Interval

FEW = 12  # rows in which a value may be repeated


@dataclass(frozen=True)
class Column:
    """`key` of the row, the title, and how a value is written; numbers stand to the right."""

    key: str
    title: str
    write: Callable[[Any], str] = str
    right: bool = False


def number(key: str, title: str, write: Callable[[Any], str] = str) -> Column:
    return Column(key, title, write, right=True)


@dataclass(frozen=True)
class Table:
    """A table of the report; `unit` is what its rows are. Columns without a value are left out, and
    in a long table those with the same value in every row are told in `note` once.
    """

    title: str
    every: Sequence[Column]
    rows: list[dict]
    unit: str = "cases"
    example: str = "4096"
    note: str = ""

    @property
    def columns(self) -> list[Column]:
        """The columns that are shown."""
        return [column for column in filled(self.every, self.rows) if column not in self._same]

    @property
    def words(self) -> str:
        """The note, with what is the same in all rows."""
        same = ", ".join(f"{c.title} {_written(c, self.rows[0])}" for c in self._same)
        told = f"In every row: {same}." if same else ""
        return " ".join(part for part in (self.note, told) if part)

    @property
    def cells(self) -> list[list[tuple[Column, str]]]:
        """The written cells of each row, with their columns."""
        columns = self.columns
        return [[(column, _written(column, row)) for column in columns] for row in self.rows]

    @property
    def _same(self) -> list[Column]:
        if len(self.rows) < FEW:
            return []
        every = filled(self.every, self.rows)
        return [c for c in every if len({_written(c, row) for row in self.rows}) == 1]


def filled(columns: Sequence[Column], rows: Sequence[dict]) -> list[Column]:
    """The columns that have a value in some row."""
    return [c for c in columns if any(row.get(c.key) is not None for row in rows)]


def as_text(columns: Sequence[Column], rows: Iterable[dict]) -> str:
    """Aligned plain text, with a line under the titles."""
    cells = [[column.title for column in columns]]
    cells += [[_written(column, row) for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for row in cells:
        parts = [
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(row, widths, columns, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def as_markdown(columns: Sequence[Column], rows: Iterable[dict]) -> str:
    """A Markdown table; what Markdown would read as its own is escaped."""
    lines = [
        _markdown_row(column.title for column in columns),
        _markdown_row("---:" if column.right else "---" for column in columns),
    ]
    lines += [_markdown_row(_escape(_written(column, row)) for column in columns) for row in rows]
    return "\n".join(lines)


def as_csv(columns: Sequence[Column], rows: Iterable[dict]) -> str:
    """CSV with the keys as header; an Interval becomes three columns."""
    rows = [_apart(row) for row in rows]
    ends = [(column.key, end) for column in columns for end in ("", "_low", "_high")]
    names = [key + end for key, end in ends if not end or any(key + end in row for row in rows)]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _apart(row: dict) -> dict:
    """The row with each Interval as three values."""
    ratios = {key: value for key, value in row.items() if isinstance(value, Interval)}
    made = row | {key: ratio.value for key, ratio in ratios.items()}
    made |= {f"{key}_low": ratio.low for key, ratio in ratios.items()}
    return made | {f"{key}_high": ratio.high for key, ratio in ratios.items()}


def seconds(value: float) -> str:
    """12.3 ns, 12.3 µs, 1.23 ms, 1.23 s: three digits that mean something."""
    return _scaled(value, ((1.0, " s"), (1e-3, " ms"), (1e-6, " µs"), (1e-9, " ns")))


def milliseconds(value: float) -> str:
    """Milliseconds without their unit: one unit down a column compares at a glance."""
    return _three(value * 1e3)


def size(value: float) -> str:
    """Bytes in the binary unit that fits: 512 B, 1.50 KiB, 288 MiB, 1.12 GiB."""
    if abs(value) < 0.9995 * 2**10:
        return f"{value:.0f} B"
    return _scaled(
        value, ((2.0**40, " TiB"), (2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB"))
    )


def count(value: float) -> str:
    """A large number with a suffix: 1.23 M."""
    return _scaled(value, ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, "")))


def percent(value: float) -> str:
    return f"{_three(100 * value)}%"


def interval(value: Interval) -> str:
    """A ratio with its interval; alone where there are too few samples for one."""
    return str(value) if value.enough else f"{value.value:.3f}"


def change(value: float) -> str:
    """A ratio as a signed percentage: 1.1 is +10.0%."""
    return f"{100 * (value - 1):+.1f}%"


def figure(value: float) -> str:
    """A figure without a unit, three digits."""
    return _three(value) if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.2e}"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """In the largest unit of which it is 1 or more, or else in the last."""
    # 0.9995 so that what would be rounded to 1000 of a unit is written in the next one.
    fits = (unit for unit in units if abs(value) >= 0.9995 * unit[0])
    scale, name = next(fits, units[-1])
    return _three(value / scale) + name


def _three(value: float) -> str:
    size_ = abs(value)
    if size_ == 0:
        return "0"
    if size_ < 0.001:
        return f"{value:.1e}"
    digits = 0 if size_ >= 99.95 else 1 if size_ >= 9.995 else 2 if size_ >= 0.9995 else 3
    if size_ < 0.09995:
        digits = 4
    return f"{value:.{digits}f}"


def _written(column: Column, row: dict) -> str:
    value = row.get(column.key)
    return "–" if value is None else column.write(value)


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    for mark in ("\\", "|", "`", "*", "<"):
        text = text.replace(mark, "\\" + mark)
    return text.replace("\n", " ")
