"""Bars: grouped upwards, one group a name, and stacked sideways, one bar a name."""

from matplotlib.axes import Axes

from tools.drawing import style
from tools.drawing.chart import Panel


def grouped(axes: Axes, panel: Panel, ids: dict[str, str]) -> dict[str, list]:
    """A group of bars for each name, a bar for each line; the rule is dashed."""
    spots: dict[str, list] = {line.label: [] for line in panel.lines}
    most = max(sum(i in {p.x for p in line.points} for line in panel.lines) for i in _all(panel))
    width = 0.84 / most
    for i in _all(panel):
        here = [(line, p) for line in panel.lines for p in line.points if p.x == i]
        for j, (line, p) in enumerate(here):
            place = i + (j - (len(here) - 1) / 2) * width
            look = {"width": 0.92 * width, "color": line.look["color"], "clip_on": False}
            axes.bar(place, p.y, gid=f"{ids[line.label]}-{i}", label=line.label, **look)
            spots[line.label].append((place, p.y))
    if panel.y.rule is not None:
        axes.axhline(panel.y.rule, color=style.FLOOR, linestyle=(0, (4, 2)), zorder=1)
    small = {"fontsize": 9 if len(panel.names) < 8 else 7.5}
    axes.set_xticks(list(_all(panel)), panel.names, **small)
    axes.set_xlim(-0.6, len(panel.names) - 0.4)
    axes.set_ylabel(panel.y.label)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    return spots


def stacked(axes: Axes, panel: Panel, ids: dict[str, str]) -> dict[str, list]:
    """A bar for each name, its lines one after another; a line with a marker stands on top."""
    left = [0.0] * len(panel.names)
    spots: dict[str, list] = {line.label: [] for line in panel.lines}
    for line in panel.lines:
        for p in line.points:
            name, i = f"{ids[line.label]}-{p.x:.0f}", int(p.x)
            if "marker" in line.look:
                axes.plot([p.y], [i], gid=name, label=line.label, **line.look)
                spots[line.label].append((p.y, i))
                continue
            spots[line.label].append((left[i] + p.y / 2, i))
            look = {"height": 0.72, "edgecolor": style.PAPER, "linewidth": 0.5, "clip_on": False}
            look |= line.look
            axes.barh(i, p.y, left=left[i], gid=name, label=line.label, **look)
            left[i] += p.y
    for i, end in enumerate(left):
        if not end:
            axes.text(0, i, " not measured", va="center", color=style.MUTED, fontsize=8)
    axes.set_yticks(list(_all(panel)), panel.names)
    axes.set_ylim(len(panel.names) - 0.4, -0.6)
    longest = max([*left, *(x for spot in spots.values() for x, _ in spot)], default=1)
    axes.set_xlim(0, 1.04 * longest)
    axes.set_xlabel(panel.y.label)
    axes.grid(axis="y", visible=False)
    return spots


def _all(panel: Panel) -> range:
    return range(len(panel.names))
