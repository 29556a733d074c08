"""All plots of one or more benchmark JSON files, as PNG and SVG, and loss curves of CSV files.

    python -m tools.plot FILE... [-o DIR] [--only NAME,NAME]

A plot without data is not drawn, and the reason is printed. --only draws the named ones, as PNG.
A FILE that ends in .csv is the log of a training run (tools.curves).
"""

from pathlib import Path

from tools import curves
from tools.cases import CPU_CAVEAT
from tools.drawing import render
from tools.families import held
from tools.family import draw_all
from tools.files import ToolError, parser, run, save
from tools.results import load_all


def main(argv: list[str]) -> int:
    command = parser("plot", __doc__)
    command.add_argument(
        "-o", "--out", default="plots", metavar="DIR", help="folder for the plots (default plots)"
    )
    command.add_argument("--only", metavar="NAMES", help="these plots, by name, as PNG alone")
    options = command.parse_args(argv)
    files, runs = curves.split(options.files)
    folder = Path(options.out)
    if folder.exists() and not folder.is_dir():
        raise ToolError(f"{folder} is a file; -o names the folder that takes the plots")
    drawings, absent, results = [], {}, load_all(files) if files else None
    for note in results.notes if results else ():
        print(f"note: {note}")
    for family, own in held(results).values() if results else ():
        drawn, missing = draw_all(own, family)
        drawings, absent = drawings + drawn, absent | missing
    drawings += [curves.curve(run) for run in runs]
    wanted = options.only.split(",") if options.only else [d.name for d in drawings]
    if unknown := set(wanted) - {drawing.name for drawing in drawings}:
        names = ", ".join(drawing.name for drawing in drawings)
        raise ToolError(f"no plot {', '.join(sorted(unknown))} of these files; there are {names}")
    for drawing in (drawing for drawing in drawings if drawing.name in wanted):
        if options.only:
            written = {".png": render.png(drawing)}
        else:
            written = dict(zip((".png", ".svg"), render.png_and_svg(drawing), strict=True))
        for suffix, content in written.items():
            save(folder / f"{drawing.name}{suffix}", content)
        print(f"{folder / drawing.name}{', '.join(written)}: {drawing.title}")
    for name, reason in absent.items():
        print(f"not drawn: {name}: {reason}")
    if results and results.cpu:
        print(f"{CPU_CAVEAT}.")
    return 0


if __name__ == "__main__":
    run(main)
