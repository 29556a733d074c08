"""Drawings on paper: panels, axes and legend by matplotlib, as PNG with all its words, and as the
bare SVG of a page, where title, legend and values are HTML.

Ids in an SVG: `NAME-l2` begins those of all that belongs to the drawing's line 2.
"""

import io
import math
import textwrap
from collections.abc import Iterable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from tools.drawing import style, ticks
from tools.drawing.chart import Drawing, Line, Panel

FURTHER = 1.5  # by which a line that is not drawn at first may widen an axis
RULE = {"color": style.FLOOR, "linewidth": 1.4}


def png(drawing: Drawing) -> bytes:
    """The main lines, with title and legend, 150 dots an inch, in 256 colours."""
    return _png(figure(drawing.only_main()))


def svg(drawing: Drawing) -> bytes:
    """The same as SVG; the same results give the same bytes."""
    return _svg(figure(drawing.only_main()))


def png_and_svg(drawing: Drawing) -> tuple[bytes, bytes]:
    """Both, of one figure: its layout takes as long as the writing."""
    made = figure(drawing.only_main())
    return _png(made), _svg(made)


def bare_svg(drawing: Drawing) -> tuple[str, list[list]]:
    """The SVG with every line and without title and legend, and for each label its points:
    [x and y in the SVG's points, panel, text of x, text of y].
    """
    with matplotlib.rc_context(style.RC):
        made, axes, spots = _panels(drawing)
        _settle(made)
        found: list[list] = [[] for _ in drawing.labels]
        height, scale = made.get_figheight() * 72, 72 / made.dpi
        for i, (one, panel) in enumerate(zip(axes, drawing.panels, strict=True)):
            for line in panel.lines:
                places = one.transData.transform(spots[i][line.label])
                points = found[drawing.labels.index(line.label)]
                for p, (x, y) in zip(line.points, places.tolist(), strict=True):
                    if not one.bbox.padded(2).contains(x, y):
                        continue
                    spot = [round(scale * x, 1), round(height - scale * y, 1)]
                    points.append([*spot, i, *_words(panel, p)])
        return _svg(made).decode(), found


def figure(drawing: Drawing) -> Figure:
    """The figure with its title, subtitle and one legend below all panels."""
    with matplotlib.rc_context(style.RC):
        labels = [label.replace(" ≈ ", " ≈\n") for label in drawing.labels]
        # Inches: the sample of the line, the longest label at 9.5 points, and a gap.
        widest = 0.62 + 0.072 * max(len(part) for text in labels for part in text.split("\n"))
        across = max(1, min(len(labels), int((_width(drawing) - 0.2) / widest)))
        down = math.ceil(len(labels) / across)
        parts = [labels[i : i + down] for i in range(0, len(labels), down)]
        most = max(sum(text.count("\n") + 1 for text in part) for part in parts)
        told = textwrap.wrap(drawing.subtitle, int((_width(drawing) - 0.2) / 0.083))
        more = max(0, len(told) - 1)
        made, axes, _ = _panels(drawing, legend=0.175 * (most + more) + 0.75)
        title = drawing.title + "\n" * (1 + more)
        made.suptitle(title, x=0.012, ha="left", fontsize=13.5, fontweight="bold")
        # Hung from the top edge, in the lines that the title keeps free.
        top = 1 - (0.39 + 0.0875 * more) / made.get_figheight()
        made.text(0.012, top, "\n".join(told), color=style.MUTED, ha="left", va="center")
        entries: dict[str, object] = {}
        for one in axes:
            for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
                entries.setdefault(label.replace(" ≈ ", " ≈\n"), handle)
        made.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower left",
            ncols=across,
            handlelength=2.6,
            columnspacing=1.6,
        )
        _settle(made)
    return made


def _panels(
    drawing: Drawing, legend: float = 0.0
) -> tuple[Figure, list[Axes], list[dict[str, list]]]:
    """The figure, its axes, and of each the places of every line's points in its data."""
    count = len(drawing.panels)
    across = min(count, drawing.columns)
    down = math.ceil(count / across)
    size = (_width(drawing), drawing.height * down + legend)
    made = Figure(figsize=size, layout="constrained")
    axes = [one for row in made.subplots(down, across, squeeze=False) for one in row]
    for unused in axes[count:]:
        unused.remove()
    axes = axes[:count]
    ids = {label: f"{drawing.name}-l{i}" for i, label in enumerate(drawing.labels)}
    spots = []
    for i, (one, panel) in enumerate(zip(axes, drawing.panels, strict=True)):
        one.set_title(panel.title)
        here = {label: f"{name}-p{i}" for label, name in ids.items()}
        spots.append((drawing.draw or lines)(one, panel, here))
    if drawing.draw is None:
        _y_axes(axes, drawing.panels, across)
    return made, axes, spots


def _width(drawing: Drawing) -> float:
    across = min(len(drawing.panels), drawing.columns)
    return {1: 7.2, 2: 9.2}.get(across, 3.3 * across)


def lines(axes: Axes, panel: Panel, ids: dict[str, str]) -> dict[str, list]:
    """The lines of a panel with their intervals, and its x axis; where each point lies."""
    if panel.y.rule is not None:
        axes.axhline(panel.y.rule, zorder=1, **RULE)
    for line in panel.lines:
        x, y = [p.x for p in line.points], [p.y for p in line.points]
        # It is cut where it may leave the panel.
        options = {"gid": ids[line.label], "label": line.label, "clip_on": _leaves(line)}
        axes.plot(x, y, **options, **line.look)
        _whiskers(axes, line, ids[line.label])
    sizes = {p.x for line in panel.lines for p in line.points}
    if panel.x == "step":
        axes.set_xlabel("step")
    else:
        ticks.size_axis(axes, panel.x, sizes)
    return {line.label: [(p.x, p.y) for p in line.points] for line in panel.lines}


def _whiskers(axes: Axes, line: Line, name: str) -> None:
    spread = [p for p in line.points if p.low is not None and p.high is not None]
    if spread:
        bars = axes.vlines(
            [p.x for p in spread],
            [p.low for p in spread],
            [p.high for p in spread],
            color=line.look.get("color", style.INK),
            linewidth=1,
            clip_on=_leaves(line),
        )
        bars.set_gid(f"{name}-w")


def _y_axes(axes: list[Axes], panels: tuple[Panel, ...], across: int) -> None:
    """Panels of one ratio or share have the same limits, those of times and sizes their own."""
    shared = {p.y.label for p in panels if p.y.scale in ("ratio", "even")}
    limits = [_limits(panel) for panel in panels]
    for one, panel, (low, high) in zip(axes, panels, limits, strict=True):
        if panel.y.label in shared:
            same = [ends for ends, p in zip(limits, panels, strict=True) if p.y == panel.y]
            low, high = min(low for low, _ in same), max(high for _, high in same)
        y = panel.y
        if y.scale == "even":
            one.set_ylim(0, 1.06 * high)
            continue
        margin = max((high / low) ** 0.06, 1.03)
        one.set_ylim(low / margin, high * margin)
        if y.scale == "ratio":
            ticks.ratio_axis(one, y.least)
        elif y.scale == "bytes":
            ticks.byte_axis(one)
        else:
            ticks.log_axis(one, y.write)
    for i, (one, panel) in enumerate(zip(axes, panels, strict=True)):
        if i % across == 0 or panels[i - 1].y.label != panel.y.label:
            one.set_ylabel(panel.y.label)


def _limits(panel: Panel) -> tuple[float, float]:
    """The least and the largest value of the main lines, a little more for those switched on."""
    within = [line for line in panel.lines if not _leaves(line)] or panel.lines
    main = _values(within) + ([] if panel.y.rule is None else [panel.y.rule])
    low, high = min(main) / FURTHER, max(main) * FURTHER
    others = _values(line for line in panel.lines if not line.bound)
    values = [*main, *(value for value in others if low <= value <= high)]
    return min(values), max(values)


def _leaves(line: Line) -> bool:
    """Whether it may leave the panel: what only bounds the others, or is not drawn at first."""
    return line.bound or not line.main


def _values(lines: Iterable[Line]) -> list[float]:
    found = (v for line in lines for p in line.points for v in (p.y, p.low, p.high))
    return [value for value in found if value is not None]


def _words(panel: Panel, p) -> list[str]:
    x = panel.names[round(p.x)].replace("\n", " ") if panel.names else f"{panel.x} {p.x:g}"
    y = panel.y.write(p.y)
    if p.low is not None and p.high is not None:
        y += f" [{panel.y.write(p.low)}, {panel.y.write(p.high)}]"
    return [x, y + (f" ({p.note})" if p.note else "")]


def _settle(made: Figure) -> None:
    """The layout is found once, not for each file anew."""
    made.draw_without_rendering()
    made.set_layout_engine("none")


def _png(made: Figure) -> bytes:
    # Compressed once, with its few colours.
    whole = io.BytesIO(_saved(made, "png", dpi=150, pil_kwargs={"compress_level": 0}))
    out = io.BytesIO()
    Image.open(whole).convert("RGB").quantize(256).save(out, "png", optimize=True)
    return out.getvalue()


def _svg(made: Figure) -> bytes:
    return _saved(made, "svg", metadata={"Date": None})


def _saved(made: Figure, kind: str, **options) -> bytes:
    out = io.BytesIO()
    with matplotlib.rc_context(style.RC):
        made.savefig(out, format=kind, facecolor=style.PAPER, **options)
    return out.getvalue()
