"""One HTML file with everything: verdict, plots, tables, environment. It needs no network.

    python -m tools.report FILE... [-o report.html]

A FILE that ends in .csv is the log of a training run, whose loss curve becomes a section
(tools.curves). -o may name a folder, which then takes report.html. The page works on a phone, in
light and in dark mode, and without JavaScript (which sorts and searches the tables, switches the
lines of a chart on and off, and says the values of its points).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from tools import curves
from tools.cases import CPU_CAVEAT, Results
from tools.drawing.page import chart
from tools.families import held
from tools.family import draw_all
from tools.files import ToolError, parser, run, save
from tools.judged import Verdict
from tools.results import load_all
from tools.verdict import judged

TEMPLATES = Path(__file__).parent / "templates"


def page(results: Results, verdicts: list[Verdict], runs: Sequence[str] = ()) -> str:
    """The whole report as HTML. runs: CSV files of training runs."""
    families, checks, settings, absent = [], [], [], {}
    for name, (family, own) in held(results).items():
        drawings, missing = draw_all(own, family)
        absent |= missing
        settings += [drawing for drawing in drawings if drawing.setting]
        charts = [
            chart(drawing, f"c{len(families)}-{i}")
            for i, drawing in enumerate(drawings)
            if not drawing.setting
        ]
        checks += [one for one in charts if one["drawing"].checks]
        charts = [one for one in charts if not one["drawing"].checks]
        families.append(
            {
                "name": name,
                "title": family.title,
                "question": family.question,
                "reading": family.reading,
                "tables": family.tables(own),
                "main": charts[0] if charts else None,
                "plots": charts[1:],
            }
        )
    if runs:
        drawn = [chart(curves.curve(run), f"r{i}") for i, run in enumerate(runs)]
        families.append(curves.section(drawn))
    loader = jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(
        results=results,
        facts=_facts(results),
        warnings=_warnings(results),
        here="on this CPU, not on GPUs" if results.cpu else "",
        verdicts=verdicts,
        families=families,
        checks=checks,
        settings=settings,
        absent=absent,
        environment=_environment(results),
    )


def _facts(results: Results) -> list[str]:
    files = ", ".join(Path(file).name for file in results.files)
    parts = (f"{len(results.results)} cases", results.days, files, results.versions)
    return [part for part in parts if part]


def _warnings(results: Results) -> list[str]:
    said = "Correctness means the same everywhere; times and ratios are host time of this CPU."
    return [f"{CPU_CAVEAT}. {said}"] * results.cpu + list(results.notes)


def _environment(results: Results) -> list[tuple[str, str]]:
    items = []
    for name, value in {"files": list(results.files), **results.machine}.items():
        if value is None or value == [] or value == {}:
            continue
        if name == "topology" and isinstance(value, list):
            value = "\n".join("  ".join(f"{cell!s:>5}" for cell in row) for row in value)
        elif isinstance(value, dict | list):
            value = json.dumps(value, ensure_ascii=False)
        items.append((name.replace("_", " "), str(value)))
    clocks = [json.dumps(r.clocks) for r in results.results if r.clocks]
    if clocks:
        items += [("clocks, first case", clocks[0]), ("clocks, last case", clocks[-1])]
    return items


def main(argv: list[str]) -> int:
    command = parser("report", __doc__)
    command.add_argument(
        "-o", "--out", default="report.html", metavar="FILE", help="default report.html"
    )
    options = command.parse_args(argv)
    files, runs = curves.split(options.files)
    if not files:
        raise ToolError("a report needs a benchmark JSON file; for a loss curve alone, tools.plot")
    results = load_all(files)
    path = Path(options.out)
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        path = path / "report.html"
    save(path, page(results, judged(results), runs))
    print(path)
    return 0


if __name__ == "__main__":
    run(main)
