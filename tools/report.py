"""One HTML file with everything: verdict, plots, tables, environment. It needs no network.

    python -m tools.report FILE... [-o report.html]

-o may name a folder, which then takes report.html. The page works on a phone, in light and in dark
mode, and without JavaScript (which only sorts and searches the tables).
"""

import argparse
import html
import json
import re
from pathlib import Path

from tools import verdict as words
from tools.cases import CPU_CAVEAT, PHASES, Results
from tools.drawing import style
from tools.families.attention import section as attention_report
from tools.families.attention.points import FAMILY, has_attention, only_attention
from tools.families.figures import ATTENTION_FIGURES, FIGURES, MAIN, Drawing, draw_all
from tools.families.linear.case_table import phase_table
from tools.families.linear.hypotheses import Verdict, judge_all
from tools.files import read_text, run, save
from tools.results import load_all
from tools.tables import as_html

HERE = Path(__file__).parent

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
{body}
<script>
{js}</script>
</body>
</html>
"""

HOW_TO_READ = (
    "<b>Times</b> are medians of device time over all rounds of a case; of the ranks, the "
    "slowest counts. No time is given for a case whose correctness check failed.",
    "<b>A ratio</b> comes with its 95% interval, from a bootstrap over blocks of consecutive "
    "rounds. Below 1 the first method named takes less time.",
    "<b>faster, slower</b> need both: a difference beyond the threshold and an interval that "
    "excludes 1. <b>same</b> means that the whole interval lies within the threshold. The rest "
    "is <b>unsure</b>.",
    "<b>The floor</b> is the least time this machine could take: the largest of arithmetic, "
    "memory and wire traffic at their measured rates.",
    "<b>Intervals</b> speak of one run. Between runs times move by a few percent, ratios of "
    "methods that were measured interleaved hardly at all.",
    "<b>A name</b> such as block_shock · 1100 · cusparselt · exchange tells the mask, the kernel "
    "of the product and the way of summing over ranks (reduce), each only where it is not what the "
    "method uses when nothing is asked. <code>path</code> in the tables says which code ran.",
    "<b>dense TP</b>, against which the hypotheses are decided, sums as users do today, with the "
    "library's collective. Beside it stands dense TP with the same reduce as Block-Shock.",
    "<b>block_shock</b> is what the hypotheses are about: 2:4 kernels. "
    "<b>block_shock_folded</b> is the fixed pattern computed as a dense product of its kept "
    "columns, and stands beside it.",
)
GENERAL = 5  # of HOW_TO_READ; the rest is about linear layers
TABLES = (
    '<h2 id="tables">Tables</h2>'
    '<p class="muted">A click on a title sorts; the search keeps rows with every word.</p>'
)
QUESTIONS = {
    "linear": "When does a dense layer, held as a sum of 2:4-sparse terms on several GPUs, beat "
    "the ordinary ways of splitting it?",
    FAMILY: "How near do attention kernels come to what the machine could do, and how much of its "
    "sparsity does a pattern turn into speed?",
}


def page(
    results: Results, verdicts: list[Verdict], drawings: list[Drawing], absent: dict[str, str]
) -> str:
    """The whole report as HTML; drawings and absent are those of `draw_all`."""
    attention = attention_report.section(results, drawings, _plot)
    linear = [r for r in results.results if r.case.family != FAMILY]
    drawings = [d for d in drawings if not d.name.startswith(tuple(ATTENTION_FIGURES))]
    main = [drawing for drawing in drawings if drawing.name == MAIN] or drawings[:1]
    others = [d for d in drawings if d.name in FIGURES and d not in main]
    settings = [d for d in drawings if d not in main + others]
    phases = [phase for phase in PHASES if any(r.case.phase == phase for r in linear)]
    phases += sorted({r.case.phase for r in linear} - set(PHASES))
    tables = "".join(phase_table(results, phase) for phase in phases)
    reading = HOW_TO_READ if linear else HOW_TO_READ[:GENERAL]
    body = "\n".join(
        [
            _header(results),
            "<main>",
            _warnings(results),
            f'<h2 id="verdict">Verdict</h2>{_cards(verdicts, results)}',
            _evidence(verdicts),
            '<h2 id="main-plot">The main plot</h2>' if main else "",
            *map(_plot, main),
            *([attention] if attention else []),
            '<h2 id="reading">How to read this</h2>',
            f'<div class="panel"><ul>{"".join(f"<li>{t}</li>" for t in reading)}</ul></div>',
            '<h2 id="plots">More plots</h2>' if others else "",
            *map(_plot, others),
            _folded(settings),
            _not_drawn(absent),
            *([TABLES, tables] if linear else []),
            '<h2 id="environment">Environment</h2>',
            _environment(results),
            "</main>",
            "<footer>Written by tools/report.py from the files named above; "
            "no number in it was typed by hand.</footer>",
        ]
    )
    return PAGE.format(
        title=html.escape(f"Block-Shock · {results.title}"),
        css=read_text(HERE / "page.css"),
        js=read_text(HERE / "page.js"),
        body=body,
    )


def themed(svg: str, name: str) -> str:
    """An SVG to stand in a page: its ids made unique by `name`, its plain colours the theme's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page sets the width; the height follows from the viewBox.
    svg = re.sub(r'^<svg\b([^>]*?) width="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg\b([^>]*?) height="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    theme = (
        (style.INK, "ink"),
        (style.MUTED, "muted"),
        (style.GRID, "grid"),
        (style.PAPER, "paper"),
    )
    for colour, variable in theme:
        svg = re.sub(re.escape(colour), f"var(--{variable})", svg, flags=re.IGNORECASE)
    return svg


def _header(results: Results) -> str:
    dates = ", ".join(sorted({date[:10] for date in results.dates if date}))
    files = ", ".join(Path(file).name for file in results.files)
    facts = " · ".join(
        part for part in (f"{len(results.results)} cases", dates, files, results.versions) if part
    )
    families = ("linear", FAMILY) if has_attention(results) else ("linear",)
    families = (FAMILY,) if only_attention(results) else families
    links = (
        ("verdict", "Verdict"),
        *[("main-plot", "Main plot")] * ("linear" in families),
        *[("attention", "Attention")] * (FAMILY in families),
        ("reading", "How to read"),
        *[("plots", "Plots"), ("tables", "Tables")] * ("linear" in families),
        ("environment", "Environment"),
    )
    menu = "".join(f'<a href="#{place}">{text}</a>' for place, text in links)
    return (
        f"<header><h1>Block-Shock on {html.escape(results.device)}</h1>"
        f"<p>{' '.join(QUESTIONS[family] for family in families)}</p>"
        f'<p class="muted small">{html.escape(facts)}</p>'
        f"<nav>{menu}</nav></header>"
    )


def _warnings(results: Results) -> str:
    texts = list(results.notes)
    if results.cpu:
        said = "Correctness means the same everywhere; times, ratios and the verdict are those of "
        said += "this CPU, where the 2:4 products are plain PyTorch."
        if only_attention(results):
            said = "Correctness means the same everywhere; times and ratios are those of this CPU."
        texts.insert(0, f"{CPU_CAVEAT}. {said}")
    return "".join(f'<p class="warning" role="note">{html.escape(text)}</p>' for text in texts)


def _cards(verdicts: list[Verdict], results: Results) -> str:
    if not verdicts:
        return f"<p>{words.NOTHING}</p>"
    here = ' <span class="muted small">on this CPU, not on GPUs</span>' if results.cpu else ""
    cards = "".join(
        f'<section class="card"><div><span class="name">{verdict.name}</span>'
        f'<span class="status {verdict.status}">{verdict.status}</span>{here}</div>'
        f'<p class="claim">{html.escape(verdict.claim)}</p>'
        f'<p class="small">{html.escape(_sentence(verdict.headline))}</p></section>'
        for verdict in verdicts
    )
    return f'<div class="cards">{cards}</div>'


def _evidence(verdicts: list[Verdict]) -> str:
    parts = []
    for verdict in verdicts:
        inner = "".join(
            f"<h3>{html.escape(words.title(finding))}</h3>"
            f'<p class="small">{html.escape(_sentence(finding.text))}</p>'
            + (as_html(words.columns(finding), words.rows(finding)) if finding.points else "")
            for finding in verdict.findings
        )
        if inner:
            summary = f"Evidence for {verdict.name}: every point"
            parts.append(f'<details class="box"><summary>{summary}</summary>{inner}</details>')
    return "".join(parts)


def _plot(drawing: Drawing) -> str:
    name = html.escape(drawing.name)
    svg = themed(drawing.svg().decode(), name)
    label = html.escape(f"{drawing.title}. {drawing.caption}")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return (
        f'<figure class="plot" id="plot-{name}"><div class="scroll">{svg}</div>'
        f"<figcaption>{html.escape(drawing.caption)}</figcaption></figure>"
    )


def _folded(drawings: list[Drawing]) -> str:
    """The same plots in the settings with fewer results: other dtypes, optimizers, policies."""
    if not drawings:
        return ""
    summary = f"The same plots in other settings ({len(drawings)})"
    inner = "".join(map(_plot, drawings))
    return f'<details class="box"><summary>{summary}</summary>{inner}</details>'


def _not_drawn(absent: dict[str, str]) -> str:
    if not absent:
        return ""
    items = "".join(
        f"<li><code>{html.escape(name)}</code>: {html.escape(reason)}</li>"
        for name, reason in absent.items()
    )
    return (
        f'<details class="box"><summary>{len(absent)} plots were not drawn</summary>'
        f"<ul>{items}</ul></details>"
    )


def _environment(results: Results) -> str:
    items = []
    for name, value in {"files": list(results.files), **results.machine}.items():
        if value is None or value == [] or value == {}:
            continue
        if name == "topology" and isinstance(value, list):
            text = "\n".join("  ".join(f"{cell!s:>5}" for cell in row) for row in value)
            shown = f"<pre>{html.escape(text)}</pre>"
        elif isinstance(value, dict | list):
            shown = f"<code>{html.escape(json.dumps(value, ensure_ascii=False))}</code>"
        else:
            shown = html.escape(str(value))
        items.append(f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd>{shown}</dd>")
    clocks = [r for r in results.results if r.clocks]
    if clocks:
        first, last = clocks[0], clocks[-1]
        for text, result in (("first case", first), ("last case", last)):
            value = html.escape(json.dumps(result.clocks))
            items.append(f"<dt>clocks, {text}</dt><dd><code>{value}</code></dd>")
    return f'<div class="panel"><dl>{"".join(items)}</dl></div>'


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument(
        "-o", "--out", default="report.html", metavar="FILE", help="default report.html"
    )
    options = parser.parse_args(argv)
    results = load_all(options.files)
    path = Path(options.out)
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        path = path / "report.html"
    save(path, page(results, judge_all(results), *draw_all(results)))
    print(path)
    return 0


if __name__ == "__main__":
    run(main)
