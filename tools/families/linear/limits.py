"""How near to what the machine could do: measured time over floor, and the share of it reached."""

from collections.abc import Sequence

from tools.cases import Result, Results
from tools.drawing import style, ticks
from tools.drawing.style import Absent, Drawing
from tools.families.linear import looks

SMALL_BATCH = 64
WORDS = {"forward": "Forward", "training": "Training step"}


def over_floor(results: Results, phase: str) -> list[Drawing]:
    """Measured time over its floor: against N at the largest B and a small one, against B at the
    largest N.
    """
    found = [r for r in results.of(phase) if r.floor.get("seconds", 0) > 0]
    groups = style.settings(found, f"{phase} results with a floor")
    title = f"{WORDS[phase]}: measured time over its floor"
    drawings, reason = [], Absent("")
    for text, group in groups.items():
        try:
            panels = _panels(group)
        except Absent as error:
            reason = error
            continue
        canvas = style.canvas(1, len(panels), height=4.2, sharey=True)
        for axes, (x, words, panel) in style.placed(canvas, panels):
            axes.set_title(words)
            for line in style.lines(panel):
                times = [r.median / r.floor["seconds"] for r in line]
                axes.plot([getattr(r.case, x) for r in line], times, **looks.line_style(line[0]))
            axes.axhline(1, color=style.FLOOR, linewidth=1.6)
            ticks.size_axis(axes, x, [getattr(r.case, x) for r in panel])
        lowest = min(r.median / r.floor["seconds"] for _, _, panel in panels for r in panel)
        canvas.axes[0][0].set_yscale("log")
        canvas.axes[0][0].set_ylim(bottom=min(1, lowest) / 1.02)
        ticks.ratio_axis(canvas.axes[0][0], least=1)
        canvas.axes[0][0].set_ylabel("measured / floor")
        figure = style.finish(canvas, title, results, text)
        caption = (
            "How many times its floor each method takes; lower is better, and 1 is the floor: the "
            "largest of its arithmetic, memory traffic and wire traffic at the rates measured on "
            "this machine. Each method has a floor of its own, so a low line is a good "
            "implementation, not yet a fast method."
        )
        name = style.file_name(f"{phase}_over_floor", text, groups)
        drawings.append(Drawing(name, title, caption, figure))
    if not drawings:
        raise reason
    return drawings


def _panels(group: Sequence[Result]) -> list[tuple[str, str, list[Result]]]:
    """(x axis, title, results) of each panel that has two sizes or more."""
    batches = {r.case.B for r in group}
    small = SMALL_BATCH if SMALL_BATCH in batches else min(batches)
    largest = max(r.case.N for r in group)
    wanted = [("N", "B", small), ("N", "B", max(batches)), ("B", "N", largest)]
    panels = []
    for x, other, value in dict.fromkeys(wanted):
        panel = [r for r in group if getattr(r.case, other) == value]
        if len({getattr(r.case, x) for r in panel}) > 1:
            panels.append((x, f"{other} = {value}", panel))
    if not panels:
        raise Absent("a line needs two values of N with the same B, or of B with the same N")
    return panels


def floor_share_vs_size(results: Results) -> list[Drawing]:
    """How much of what the machine could do each method reaches, against N."""
    groups = style.settings([r for r in results.of("forward") if "seconds" in r.floor], "forward")
    title = "Forward: share of its own limit that each method reaches"
    drawings = []
    for text, found in groups.items():
        panels = style.panels_over(found, "N")
        bands, columns = style.folded(len(panels))
        canvas = style.canvas(bands, columns, sharey=True)
        for axes, (b, panel) in style.placed(canvas, panels):
            axes.set_title(f"B = {b}")
            axes.axhline(100, color=style.FLOOR, linewidth=1.2)
            for line in style.lines(panel):
                shares = [100 * r.floor["seconds"] / r.median for r in line]
                axes.plot([r.case.N for r in line], shares, **looks.line_style(line[0]))
            ticks.size_axis(axes, "N", [r.case.N for r in panel])
            axes.set_ylim(bottom=0)
        for row in canvas.axes:
            row[0].set_ylabel("floor / measured time (%)")
        figure = style.finish(canvas, title, results, text)
        caption = (
            "The floor of a method is the largest of its arithmetic, its memory traffic and "
            "its wire traffic, each at the rate measured on this machine. 100% cannot be "
            "passed but by noise; what is missing to it is what a better kernel or overlap "
            "could still win."
        )
        name = style.file_name("forward_floor_vs_N", text, groups)
        drawings.append(Drawing(name, title, caption, figure))
    return drawings
