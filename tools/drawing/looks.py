"""How a line looks: one colour and marker for each method, and what marks its variants.

The colours are those of Okabe and Ito, which the colour-blind tell apart; markers and dashes say
the same again. A method keeps its colour in every figure. A variant is a darker or lighter shade of
it, with dashes of its own: a policy, or else an unusual mask, kernel or reduce. An unusual kernel
has its own marker, an unusual reduce a hollow one. Each label looks the same in every figure.
"""

from matplotlib.colors import to_hex, to_rgb

from tools.cases import Result
from tools.drawing.style import PAPER

# For methods that are not known here, by name.
SPARE_STYLES = (
    ("#e69f00", "v"),
    ("#882255", "<"),
    ("#44aa99", ">"),
    ("#332288", "p"),
    ("#999933", "h"),
    ("#aa4499", "*"),
)
KERNEL_MARKERS = {"auto": "p", "cusparselt": "v", "thin": "*", "wide": "d", "folded": "h"}
# Of a variant: dashes, and a shade, towards white above 0 and towards black below.
VARIANTS = {
    "frozen": ((0, (1, 1.2)), 0),
    "dense_master": ((0, (5, 2)), 0),
    "packed_master": ("solid", 0),
    "float32_master": ((0, (1.5, 1.5)), 0),
    "1100": ((0, (6, 1.5, 1, 1.5)), -0.3),
    "1010": ((0, (3, 1, 1, 1)), 0.3),
    "1001": ((0, (3, 1, 1, 1, 1, 1)), -0.45),
    "random": ((0, (2, 1)), 0.45),
    "magnitude": ((0, (4, 1)), -0.15),
    "tile": ((0, (7, 2)), -0.2),
    "tile_magnitude": ((0, (5, 1, 2, 1)), 0.2),
    "cusparselt": ((0, (1.2, 1.2)), -0.5),
    "thin": ((0, (8, 1.5)), 0.25),
    "wide": ((0, (8, 1.5, 1, 1.5)), -0.1),
    "folded": ((0, (2, 2)), 0),
    "collective": ((0, (6, 1, 1, 1)), 0.5),
    "auto": ((0, (4, 1.5)), 0.3),
    "two_shot": ((0, (1.5, 1)), -0.25),
    "exchange": ((0, (5, 1, 1, 1, 1, 1)), -0.45),
}


def line_style(result: Result) -> dict:
    """Colour, marker and dashes of a result's line, as matplotlib's keywords."""
    method, unusual, styles = result.case.method, result.unusual, result.naming.methods
    spare = SPARE_STYLES[sum(method.encode()) % len(SPARE_STYLES)]
    colour, marker = styles.get(method, spare)
    policy = result.case.policy if result.case.phase == "training" else None
    dashes = [VARIANTS[name][0] for name in (policy, *unusual.values()) if name in VARIANTS]
    if dashes[:1] == ["solid"]:
        # The policy most trained with leaves the dashes to what is unusual.
        dashes = [*dashes[1:], "solid"]
    # Earlier methods are drawn wider, so that lines which cross are all seen.
    place = min(list(styles).index(method), 5) if method in styles else 5
    colour = shaded(colour, sum(VARIANTS[name][1] for name in unusual.values() if name in VARIANTS))
    look = {
        "color": colour,
        "marker": KERNEL_MARKERS.get(unusual.get("kernel"), marker),
        "linestyle": dashes[0] if dashes else "solid",
        "linewidth": (2.9 - 0.3 * place) * (0.75 if unusual else 1),
        "markersize": 9 - 0.4 * place,
    }
    if "reduce" in unusual:
        look |= {"markerfacecolor": PAPER, "markeredgecolor": colour, "markeredgewidth": 1.4}
    return look


def shaded(colour: str, shade: float) -> str:
    """The colour mixed with white (shade above 0) or black (below)."""
    shade = min(max(shade, -0.6), 0.5)
    end = 1.0 if shade > 0 else 0.0
    return to_hex([part + (end - part) * abs(shade) for part in to_rgb(colour)])
