"""What each family shows, and the drawings of the families that results hold."""

from tools.cases import Results
from tools.drawing.chart import Absent, Drawing
from tools.families.attention.page import SHOWN as ATTENTION
from tools.families.linear.page import SHOWN as LINEAR
from tools.families.shown import Shown

SHOWN: dict[str, Shown] = {"linear": LINEAR, "attention": ATTENTION}


def held(results: Results) -> dict[str, Shown]:
    """The known families that the results hold, in order."""
    found = {result.case.family for result in results.results}
    return {name: family for name, family in SHOWN.items() if name in found}


def unknown(results: Results) -> list[str]:
    """A line for each family that the results hold and these tools do not know."""
    found = [result.case.family for result in results.results if result.case.family not in SHOWN]
    return [
        f"{found.count(name)} cases of the family {name} are not shown: these tools do not know it"
        for name in dict.fromkeys(found)
    ]


def draw_all(results: Results, family: Shown) -> tuple[list[Drawing], dict[str, str]]:
    """Every figure of a family that has data, in order, and the others with the reason."""
    drawings: list[Drawing] = []
    absent: dict[str, str] = {}
    for name, draw in family.figures.items():
        try:
            drawings += draw(results)
        except Absent as reason:
            absent[name] = str(reason)
    return drawings, absent
