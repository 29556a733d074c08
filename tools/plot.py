"""All plots of one or more benchmark JSON files, as PNG and SVG.

    python -m tools.plot FILE... [-o DIR]

The main plot is forward_vs_N. A plot without data is not drawn, and the reason is printed.
"""

import argparse
from pathlib import Path

from tools.cases import CPU_CAVEAT
from tools.families.figures import draw_all
from tools.files import ToolError, run, save
from tools.results import load_all


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    options = _options(argv)
    results = load_all(options.files)
    folder = Path(options.out)
    if folder.exists() and not folder.is_dir():
        raise ToolError(f"{folder} is a file; -o names the folder that takes the plots")
    for note in results.notes:
        print(f"note: {note}")
    drawings, absent = draw_all(results)
    for drawing in drawings:
        save(folder / f"{drawing.name}.png", drawing.png())
        save(folder / f"{drawing.name}.svg", drawing.svg())
        print(f"{folder / drawing.name}.png, .svg: {drawing.title}")
    for name, reason in absent.items():
        print(f"not drawn: {name}: {reason}")
    if results.cpu:
        print(f"{CPU_CAVEAT}.")
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument(
        "-o", "--out", default="plots", metavar="DIR", help="folder for the plots (default plots)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
