"""How fast: the time of each method over that of dense TP as users run it, and over its floor."""

import math
from collections.abc import Sequence

from tools.cases import Result, Results, grouped, over
from tools.drawing import series, style
from tools.drawing.chart import Absent, Axis, Drawing, Point
from tools.drawing.series import Sketch, Words
from tools.families.linear.hypotheses import SHOCKS
from tools.families.linear.naming import METHODS
from tools.families.linear.opponents import DENSE, place
from tools.tables import seconds

REFERENCE = DENSE[0]
SMALL_BATCH = 64
WORDS = {
    "forward": "Forward",
    "backward": "Forward and input gradient (weights frozen)",
    "training": "Training step",
}


def leading(found: Sequence[Result]) -> set[str]:
    """The labels of the few lines that are drawn at first, the fastest of several that fit:
    block_shock with the mask 1100, and with tile; dense TP with another sum; dense TP by columns;
    one GPU alone, or else the masked split. A method that is not known here is drawn as well.
    """
    labels = grouped(found, lambda result: result.label)

    def pick(fits) -> list[str]:
        speeds = {
            label: sum(math.log(r.median / r.case.N**2 / r.case.B) for r in some) / len(some)
            for label, some in labels.items()
            if fits(some[0])
        }
        return [min(speeds, key=speeds.get)] if speeds else []

    alone = pick(lambda r: r.case.method == "dense_single" and not r.unusual)
    return {
        *pick(lambda r: r.case.method == SHOCKS[0] and r.as_usual and r.case.mask == "1100"),
        *pick(lambda r: r.case.method == SHOCKS[0] and r.as_usual and r.case.mask == "tile"),
        *pick(lambda r: r.case.method == REFERENCE and "reduce" in r.unusual),
        *pick(lambda r: r.case.method == DENSE[1] and not r.unusual),
        *(alone or pick(lambda r: r.case.method == "masked_split" and not r.unusual)),
        *(label for label, some in labels.items() if some[0].case.method not in METHODS),
    }


def few(found: Sequence[Result]) -> list[Result]:
    """The results of the leading lines of each phase, and of dense TP as users run it."""
    labels = leading(found)
    return [r for r in found if r.label in labels or (r.case.method == REFERENCE and not r.unusual)]


def over_floor(results: Results, phase: str) -> list[Drawing]:
    """Measured time over its floor: against N at the largest B and a small one, against B at the
    largest N.
    """
    found = [r for r in few(results.of(phase)) if r.floor.get("seconds", 0) > 0]
    settings = style.settings(found, f"{phase} with a floor")
    groups = {text: panels for text, group in settings.items() if (panels := _floor_panels(group))}
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


def over_dense(results: Results, phase: str, x: str = "N") -> list[Drawing]:
    """Time over dense TP against N, a panel for each B, or the other way round."""
    found = results.of(phase)
    references = {place(r): r for r in found if r.case.method == REFERENCE and not r.unusual}
    compared = [r for r in found if place(r) in references]
    if found and not compared:
        raise Absent(f"needs {REFERENCE} at the same sizes")

    def value(result: Result) -> Point | None:
        reference = references[place(result)]
        if result is reference:
            return None
        ratio = over(result, reference)
        ends = (ratio.low, ratio.high) if ratio.enough else (None, None)
        return Point(0, ratio.value, *ends, seconds(result.median))

    def floor(panel: Sketch) -> list:
        floors: dict[float, float] = {}
        for r in panel.results:
            # One GPU alone has a floor of its own kind; the limit drawn is that of the ranks.
            if r.floor.get("seconds", 0) > 0 and r.case.method != "dense_single":
                at = getattr(r.case, x)
                share = r.floor["seconds"] / references[place(r)].median
                floors[at] = min(floors.get(at, share), share)
        return series.grey("limit of the machine (floor)", floors)

    caption = (
        f"Time of each method over that of {REFERENCE} with the library's collective, which is the "
        f"grey rule at 1; below 1 the method is faster. Medians of {results.clock}, the slowest "
        "rank counts, with 95% intervals. The dashed grey line is the limit of the machine for the "
        "method that it would let run fastest, where it lies within the axis. "
        "Lines that differ by less than 1.5% everywhere are one; one that is switched on may leave "
        "the panel where it lies far from the others."
    )
    title = f"{WORDS.get(phase, phase)}: time over that of dense TP, against {x}"
    groups = series.by_size(compared, phase, x, main=leading)
    for panels in groups.values():
        panels[:] = [panel._replace(extra=floor(panel)) for panel in panels]
    y = Axis(f"time / {REFERENCE}\n(below 1: faster)", "{:.3f}".format, "ratio", 1)
    words = Words(f"{phase}_vs_{x}", title, caption)
    return series.charts(results, groups, words, y, value, main=leading)


def _floor_panels(group: Sequence[Result]) -> list[Sketch]:
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
