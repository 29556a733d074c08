"""Where the forward's time goes: all of it, the reduce, and copies made for a collective's sake."""

from dataclasses import replace

from tools.cases import Result, Results
from tools.drawing import series, style
from tools.drawing.chart import Absent, Axis, Drawing, Point
from tools.drawing.series import Sketch, Words
from tools.families.linear.speed import few
from tools.tables import seconds

MOST = 2
SHOWN = {
    "forward": "forward",
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "layout_fix": "layout-fix copies",
}


def regions_vs_size(results: Results) -> list[Drawing]:
    """Forward, all-reduce and layout-fix time against N: p50, up to p95, and the average."""
    found = [r for r in results.of("forward") if r.regions]
    groups = series.by_size(few(found), "instrumented forward", most=MOST)
    caption = (
        "Regions are timed in a pass of their own and never change the reported total. Line: p50; "
        "whisker: up to p95. Of the batches the smallest and the largest are drawn."
    )
    if not any("layout_fix" in r.regions for r in found):
        caption += " No method made a copy for layout's sake."
    words = Words("forward_regions_vs_N", "Forward: regions of a call", caption)
    for panels in groups.values():
        panels[:] = [_region(name, panel) for name in SHOWN for panel in panels]
    options = {"columns": MOST, "height": 2.6}
    return series.charts(results, groups, words, **options)


def less_layout_fix_vs_size(results: Results) -> list[Drawing]:
    """The forward less its layout-fix copies, against N, the whole forward drawn thinly."""
    found = [r for r in results.of("forward") if "forward" in r.regions]
    if not any("layout_fix" in r.regions for r in found):
        raise Absent("no forward result has a layout_fix region: no such copy was made")

    caption = (
        "Average forward less the average of copies made only to please a collective: what the "
        "method would take if the collective read the layout as it is. Dotted: with them."
    )
    words = Words("forward_less_layout_fix_vs_N", "Forward less layout-fix copies", caption)
    thin = {"marker": None, "linewidth": 0.9, "linestyle": (0, (1, 1))}
    groups = series.by_size(few(found), "instrumented forward", most=MOST)
    for panels in groups.values():
        for i, panel in enumerate(panels):
            copied = [r for r in style.lines(panel.results) if any(map(_layout, r))]
            wholes = [series.line(one, lambda r: r.case.N, _whole) for one in copied]
            panels[i] = panel._replace(
                extra=[
                    replace(one, label=f"{one.label}, layout fix included", look=one.look | thin)
                    for one in wholes
                ]
            )
    y = Axis("average time a call", seconds)
    return series.charts(results, groups, words, y, lambda r: _whole(r) - _layout(r), checks=True)


def _whole(result: Result) -> float:
    return result.regions["forward"].avg


def _layout(result: Result) -> float:
    layout = result.regions.get("layout_fix")
    return layout.avg if layout else 0.0


def _region(name: str, panel: Sketch) -> Sketch:
    def value(result: Result) -> Point | None:
        region = result.regions.get(name)
        if region is None or region.p50 <= 0:
            return None
        above = max(region.p50, region.p95)
        return Point(0, region.p50, region.p50, above, f"average {seconds(region.avg)}")

    y = Axis(SHOWN[name], seconds)
    return panel._replace(title=f"{SHOWN[name]}, {panel.title}", y=y, value=value)
