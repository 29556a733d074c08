"""Where the forward's time goes: all of it, the reduce, and copies made for a collective's sake."""

from tools.cases import Result, Results
from tools.drawing import style, ticks
from tools.drawing.style import Absent, Drawing
from tools.families.linear import looks
from tools.tables import seconds

MOST = 4
SHOWN = {
    "forward": "forward",
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "layout_fix": "layout-fix copies",
}


def regions_vs_size(results: Results) -> list[Drawing]:
    """Forward, all-reduce and layout-fix time against N: average, p50 and p95."""
    found = [r for r in results.of("forward") if r.regions]
    groups = style.settings(found, "instrumented forward")
    title = "Forward: regions of a call"
    drawings = []
    for text, group in groups.items():
        names = [name for name in SHOWN if any(name in r.regions for r in group)]
        every = style.panels_over(group, "N")
        panels = style.spread(every, MOST)
        canvas = style.canvas(len(names), len(panels), height=2.6, sharex="col")
        for row, name in zip(canvas.axes, names, strict=True):
            for axes, (b, panel) in zip(row, panels, strict=True):
                if name == names[0]:
                    axes.set_title(f"B = {b}")
                _region(axes, name, panel)
                ticks.size_axis(axes, "N", [r.case.N for r in panel], label=name == names[-1])
                if axes.has_data():
                    ticks.log_axis(axes, seconds)
            row[0].set_ylabel(SHOWN[name])
        figure = style.finish(canvas, title, results, text)
        caption = (
            "Regions are timed in a pass of their own and never change the reported total. "
            "Line and marker: p50; horizontal stroke: average; whisker: up to p95. Methods "
            "are moved a little sideways so that whiskers do not cover each other."
        )
        if len(panels) < len(every):
            caption += " Of the batches the smallest, the largest and some between are drawn."
        if "layout_fix" not in names:
            caption += " No method made a copy for layout's sake."
        name = style.file_name("forward_regions_vs_N", text, groups)
        drawings.append(Drawing(name, title, caption, figure))
    return drawings


def less_layout_fix_vs_size(results: Results) -> list[Drawing]:
    """The forward less its layout-fix copies, against N, the whole forward drawn thinly."""
    found = [r for r in results.of("forward") if "forward" in r.regions]
    if not any("layout_fix" in r.regions for r in found):
        raise Absent("no forward result has a layout_fix region: no such copy was made")
    groups = style.settings(found, "instrumented forward")
    title = "Forward less layout-fix copies"
    drawings = []
    for text, group in groups.items():
        panels = style.panels_over(group, "N")
        bands, columns = style.folded(len(panels))
        canvas = style.canvas(bands, columns)
        axes_ = [one for row in canvas.axes for one in row]
        for unused in axes_[len(panels) :]:
            unused.set_visible(False)
        for axes, (b, panel) in zip(axes_, panels, strict=False):
            axes.set_title(f"B = {b}")
            for line in style.lines(panel):
                sizes, look = [r.case.N for r in line], looks.line_style(line[0])
                axes.plot(sizes, [_less_layout(r) for r in line], **look)
                if any("layout_fix" in r.regions for r in line):
                    look |= {"marker": None, "linewidth": 0.9, "linestyle": (0, (1, 1))}
                    look["label"] = f"{line[0].label}, layout fix included"
                    axes.plot(sizes, [r.regions["forward"].avg for r in line], **look)
            ticks.size_axis(axes, "N", [r.case.N for r in panel])
            ticks.log_axis(axes, seconds)
        for row in canvas.axes:
            row[0].set_ylabel("average time a call")
        figure = style.finish(canvas, title, results, text)
        caption = (
            "Average forward less the average of copies made only to please a collective: "
            "what the method would take if the collective read the layout as it is. Dotted: "
            "with them."
        )
        name = style.file_name("forward_less_layout_fix_vs_N", text, groups)
        drawings.append(Drawing(name, title, caption, figure))
    return drawings


def _less_layout(result: Result) -> float:
    layout = result.regions.get("layout_fix")
    return result.regions["forward"].avg - (layout.avg if layout else 0.0)


def _region(axes, name: str, panel: list[Result]) -> None:
    lines = style.lines(panel)
    for i, line in enumerate(lines):
        line = [r for r in line if name in r.regions and r.regions[name].p50 > 0]
        if not line:
            continue
        sizes = [r.case.N * style.beside(i, len(lines)) for r in line]
        regions = [r.regions[name] for r in line]
        look = looks.line_style(line[0])
        middle = [region.p50 for region in regions]
        above = [max(0.0, region.p95 - region.p50) for region in regions]
        axes.errorbar(
            sizes, middle, yerr=[[0] * len(line), above], capsize=2.5, elinewidth=1, **look
        )
        axes.plot(
            sizes,
            [region.avg for region in regions],
            linestyle="none",
            marker="_",
            markersize=11,
            markeredgecolor=look["color"],
            markeredgewidth=1.2,
        )
