"""Loss curves of training runs, from the CSV that a run of `blockshock.lm` writes.

Columns that are read: step and loss; val_loss where it was measured; tokens_per_s, mfu, seconds.
"""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path

from tools.drawing.chart import Axis, Drawing, Line, Panel, Point
from tools.files import ToolError, read_text
from tools.tables import count, percent

LOOKS = {
    "training": {"color": "#0072b2", "linewidth": 1.4},
    "validation": {"color": "#d55e00", "linewidth": 1.4, "marker": "o", "markersize": 5},
}
CAPTION = (
    "Cross-entropy, natural logarithm, against the step; training: mean over the steps since the "
    "row before. The axis of losses is logarithmic."
)


def split(files: Iterable[str]) -> tuple[list[str], list[str]]:
    """(benchmark files, CSV files of training runs), by the ending."""
    files = list(files)
    curves = [file for file in files if Path(file).suffix.lower() == ".csv"]
    return [file for file in files if file not in curves], curves


def curve(path: str) -> Drawing:
    """The loss of one run. Raises ToolError for a file without steps and losses."""
    rows = read_rows(path)
    lines = []
    for label, column in (("training", "loss"), ("validation", "val_loss")):
        points = [
            Point(number(row, "step", path), number(row, column, path), note=_note(row, path))
            for row in rows
            if row.get(column)
        ]
        if points:
            lines.append(Line(label, tuple(points), LOOKS[label]))
    if not lines:
        raise ToolError(f"{path} has no loss in any row: the run ended before its first line")
    name = _name(Path(path))
    axis = Axis("loss", "{:.4f}".format, "log")
    panel = Panel("", tuple(lines), "step", axis)
    return Drawing(f"loss_{name}", f"Loss of {name}", _ended(rows[-1], path), CAPTION, (panel,))


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a run's CSV. Raises ToolError for a file without steps and losses."""
    rows = list(csv.DictReader(io.StringIO(read_text(path))))
    missing = {"step", "loss"} - set(rows[0] if rows else ())
    if missing:
        raise ToolError(
            f"{path} has no {' and no '.join(sorted(missing))} in its rows: give the CSV of a "
            "training run"
        )
    return rows


def number(row: dict, column: str, path: str | Path) -> float:
    """A value of a row. Raises ToolError for what is no finite number."""
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ToolError(f"{path} has {column} = {row[column]!r}, which is no finite number")
    return value


def section(charts: list[dict]) -> dict:
    """What the template of a family fills in, of curves that are drawn."""
    first, *others = charts
    return {
        "name": "curves",
        "title": "Training runs",
        "question": "How did the loss of each training run fall?",
        "reading": (("Losses", CAPTION),),
        "tables": [],
        "main": first,
        "plots": others,
    }


def _note(row: dict, path: str) -> str:
    rate = row.get("tokens_per_s")
    return f"{count(number(row, 'tokens_per_s', path))} tokens/s" if rate else ""


def _name(path: Path) -> str:
    """The run: its folder where the file has the name that every run gives it."""
    return path.absolute().parent.name if path.stem in ("log", "losses", "loss") else path.stem


def _ended(row: dict, path: str) -> str:
    """How far the run came, as far as its last row says."""
    known = {
        "tokens": lambda value: f"{count(value)} tokens",
        "seconds": lambda value: f"{value / 60:.1f} minutes",
        "tokens_per_s": lambda value: f"{count(value)} tokens/s at the end",
        "mfu": lambda value: f"MFU {percent(value)}",
    }
    found = (write(number(row, name, path)) for name, write in known.items() if row.get(name))
    return " · ".join(found)
