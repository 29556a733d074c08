"""Axes of sizes, times and ratios: logarithmic, with plain numbers at places worth a number."""

import math
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tools.tables import count, size

# Ticks of a ratio, the most welcome first; one is drawn where it does not crowd those before it.
RATIOS = (1, 2, 0.5, 5, 0.2, 10, 0.1, 20, 50, 100, 1.5, 3, 0.7, 0.3, 1.25, 0.8, 1.1, 0.9, 30)
CROWDED = 0.07  # of the axis
NAMES = {"N": "N (weight N×N)", "B": "B (tokens)", "T": "T (queries and keys)"}


def size_axis(axes: Axes, name: str, values: Iterable[int]) -> None:
    """A log axis with ticks at the measured sizes and nowhere else."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    if len(ticks) > 5:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel(NAMES.get(name, name))


def log_axis(axes: Axes, write=count) -> None:
    """A log y axis with plain numbers as ticks: three at least, or two of a narrow one."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = [10.0**d for d in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 2, 3, 5, 7), range(1, 10)):
        ticks = [step * decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    if len(ticks) < 2:
        ticks = [tick for tick in MaxNLocator(3).tick_values(low, high) if low <= tick <= high]
    _y_axis(axes, ticks, lambda tick: _trimmed(write(tick)), low, high)


def byte_axis(axes: Axes) -> None:
    """A log y axis of bytes with ticks at powers of two, six at most."""
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first + 1) / 6))
    ticks = [2.0**e for e in range(first, last + 1, step)]
    _y_axis(axes, ticks, lambda tick: _trimmed(size(tick)), low, high)


def ratio_axis(axes: Axes, least: float = 0.9) -> None:
    """A log y axis of ratios that has 1 and a tick above it.

    least: the axis begins there, or below where a value does.
    """
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    low, high = min(low, least), max(high, 1.1)
    ticks = chosen_ticks(low, high)
    while max(ticks) <= 1:
        high *= 1.1
        ticks = chosen_ticks(low, high)
    _y_axis(axes, ticks, "{:g}".format, low, high)


def chosen_ticks(low: float, high: float) -> list[float]:
    """The RATIOS between low and high that do not crowd each other."""
    ticks: list[float] = []
    for tick in RATIOS:
        if low <= tick <= high and all(
            abs(math.log(tick / other)) >= CROWDED * math.log(high / low) for other in ticks
        ):
            ticks.append(tick)
    return sorted(ticks)


def _y_axis(axes: Axes, ticks: list[float], write, low: float, high: float) -> None:
    axes.set_yticks(ticks, [write(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)


def _trimmed(text: str) -> str:
    number, space, unit = text.partition(" ")
    if "." in number and "e" not in number:
        number = number.rstrip("0").rstrip(".")
    return number + space + unit
