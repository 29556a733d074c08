"""A drawing for a page: a small SVG in the colours of the theme, its legend, its values as JSON."""

import html
import json
import re
from typing import Any

from matplotlib.colors import to_hex
from matplotlib.markers import MarkerStyle

from tools.drawing import style
from tools.drawing.chart import Drawing
from tools.drawing.render import bare_svg

THEME = {style.INK: "ink", style.MUTED: "muted", style.GRID: "grid", style.PAPER: "paper"}
ROUNDED = re.compile(r' (d|x|y|width|height|transform)="([^"]*)"')


def chart(drawing: Drawing, key: str) -> dict[str, Any]:
    """What the template of a chart fills in: svg, its width, the legend's entries, the points.

    key: what the ids in the SVG begin with, unique in the page.
    """
    svg, points = bare_svg(drawing)
    svg, width = small(svg, drawing.name, key)
    said = html.escape(f"{drawing.title}. {drawing.caption}")
    svg = svg.replace("<svg ", f'<svg tabindex="0" role="img" aria-label="{said}" ', 1)
    looks = {line.label: line for panel in drawing.panels for line in reversed(panel.lines)}
    entries = [
        {"label": label, "swatch": swatch(looks[label].look), "on": looks[label].main}
        for label in drawing.labels
    ]
    for i, entry in enumerate(entries):
        if not entry["on"]:
            svg = svg.replace(f' id="{key}-l{i}-', f' class="off" id="{key}-l{i}-')
    # "<" could end the script element that holds it.
    panels = [" ".join(panel.title.split()) for panel in drawing.panels]
    data = {"panels": panels, "lines": points}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return {
        "drawing": drawing,
        "svg": svg,
        "width": width,
        "entries": entries,
        "points": text,
    }


def small(svg: str, name: str, key: str) -> tuple[str, int]:
    """(the SVG for a page, its width in points): ids begin with `key` in place of `name`,
    coordinates have one decimal, equal styles are one class, plain colours are the theme's.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    width, height = (float(n) for n in re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    ids = {f"{name}-": f"{key}-"}
    for i, found in enumerate(re.findall(r' id="([mCp][0-9a-f]{8,})"', svg)):
        ids[found] = f"{key}-{i}"
    svg = re.sub(rf' id="(?!{re.escape(name)}-|[mCp][0-9a-f]{{8,}}")[^"]*"', "", svg)
    svg = re.sub("|".join(map(re.escape, ids)), lambda m: ids[m[0]], svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = ROUNDED.sub(lambda m: f' {m[1]}="{_one_decimal(m[2])}"', svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?|<defs>\s*</defs>", "", svg)
    styles: dict[str, str] = {}
    svg = re.sub(
        r' style="([^"]*)"',
        lambda m: f' class="{styles.setdefault(m[1], f"s{len(styles)}")}"' if m[1] else "",
        svg,
    )
    rules = "".join(f"#{key} .{short}{{{text}}}" for text, short in styles.items())
    for colour, variable in THEME.items():
        rules = re.sub(re.escape(colour), f"var(--{variable})", rules, flags=re.IGNORECASE)
    svg = re.sub(r">\s+<", "><", svg)
    opening = f'<svg id="{key}" viewBox="0 0 {width:g} {height:g}"><style>{rules}</style>'
    svg = re.sub(r"^<svg[^>]*>", lambda _: opening, svg)
    for pattern, by in (
        (r"<g>((?:(?!</?g[ >]).)*)</g>", r"\1"),  # a group that says nothing
        (r'<path d="([^"]*)"([^>]*)/><path d="([^"]*)"\2/>', r'<path d="\1\3"\2/>'),
    ):
        while (shorter := re.sub(pattern, by, svg)) != svg:
            svg = shorter
    return svg, round(width)


def swatch(look: dict[str, Any]) -> str:
    """A sample of a line as an SVG: its colour, dashes and marker; a square for a bar."""
    colour = look.get("color", style.INK)
    parts = [f'<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true" style="color:{colour}">']
    if "marker" not in look and "linestyle" not in look:
        parts.append('<rect x="10" y="1" width="12" height="12" fill="currentColor"/>')
    elif look.get("linestyle") != "none":
        dashes = look.get("linestyle", "solid")
        dashes = "" if isinstance(dashes, str) else " ".join(f"{2 * n:g}" for n in dashes[1])
        dashes = f' stroke-dasharray="{dashes}"' if dashes else ""
        parts.append(f'<path d="M0 7H34" stroke="currentColor" stroke-width="2"{dashes}/>')
    if look.get("marker"):
        fill = look.get("markerfacecolor", colour)
        fill = "var(--paper)" if fill in ("none", style.PAPER) else to_hex(fill)
        shape = 'circle cx="17" cy="7" r="4.5"'
        if look["marker"] != "o":
            shape = f'path d="{_marker(look["marker"])}"'
        parts.append(f'<{shape} fill="{fill}" stroke="currentColor"/>')
    return "".join(parts) + "</svg>"


def _marker(marker: str) -> str:
    made = MarkerStyle(marker)
    shape = made.get_path().transformed(made.get_transform()).to_polygons(closed_only=False)
    return "".join(
        "M" + "L".join(f"{17 + 9 * x:.3g} {7 - 9 * y:.3g}" for x, y in part) for part in shape
    )


def _one_decimal(text: str) -> str:
    numbers = re.sub(r"\d+\.\d\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), text)
    return re.sub(r"\s*\b([a-zA-Z])\s*", r"\1", numbers.strip()) if numbers[:1] == "M" else numbers
