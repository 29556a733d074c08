"""How near to what the machine could do: measured time over its floor."""

from collections.abc import Sequence

from tools.cases import Result, Results
from tools.drawing import series, style
from tools.drawing.chart import Absent, Axis, Drawing
from tools.drawing.series import Sketch, Words
from tools.families.linear.speed import WORDS, few

SMALL_BATCH = 64


def over_floor(results: Results, phase: str) -> list[Drawing]:
    """Measured time over its floor: against N at the largest B and a small one, against B at the
    largest N.
    """
    found = [r for r in few(results.of(phase)) if r.floor.get("seconds", 0) > 0]
    settings = style.settings(found, f"{phase} results with a floor")
    groups = {text: panels for text, group in settings.items() if (panels := _panels(group))}
    if not groups:
        raise Absent("a line needs two values of N with the same B, or of B with the same N")
    caption = (
        "How many times its floor each method takes; lower is better, and 1 is the floor: the "
        "largest of its arithmetic, memory traffic and wire traffic at the rates measured on "
        "this machine. Each method has a floor of its own, so a low line is a good "
        "implementation, not yet a fast method."
    )
    words = Words(f"{phase}_over_floor", f"{WORDS[phase]}: measured time over its floor", caption)
    y = Axis("measured / floor", "{:.2f}".format, "ratio", 1, least=1)
    options = {"columns": 3, "height": 4}
    return series.charts(
        results, groups, words, y, lambda r: r.median / r.floor["seconds"], **options
    )


def _panels(group: Sequence[Result]) -> list[Sketch]:
    """The panels that have two sizes or more."""
    batches = {r.case.B for r in group}
    small = SMALL_BATCH if SMALL_BATCH in batches else min(batches)
    largest = max(r.case.N for r in group)
    wanted = [("N", "B", small), ("N", "B", max(batches)), ("B", "N", largest)]
    panels = []
    for x, other, value in dict.fromkeys(wanted):
        panel = [r for r in group if getattr(r.case, other) == value]
        if len({getattr(r.case, x) for r in panel}) > 1:
            panels.append(Sketch(f"{other} = {value}", x, panel))
    return panels
