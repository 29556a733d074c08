"""How each family scales over ranks, from files of several numbers of them: tables and plots.

    python -m tools.scaling FILE... [-o DIR]

Prints the tables as Markdown; -o writes the plots, as PNG and SVG. The files are of one kind of
GPU, in one host or in hosts of several sizes.
"""

from pathlib import Path

from tools.cases import CPU_CAVEAT
from tools.drawing import render
from tools.families import held
from tools.family import draw_all
from tools.files import ToolError, parser, run, save
from tools.results import load_by_card


def main(argv: list[str]) -> int:
    command = parser("scaling", __doc__)
    command.add_argument("-o", "--out", metavar="DIR", help="folder for the plots")
    options = command.parse_args(argv)
    results, *others = load_by_card(options.files)
    if others:
        cards = ", ".join(one.device for one in (results, *others))
        raise ToolError(f"these files are of {cards}: give files of one kind of GPU")
    tables, drawings = [], []
    for family, own in held(results).values():
        if family.scaling:
            tables += family.scaling.tables(own)
            drawings += draw_all(own, family.scaling)[0]
    if not tables:
        raise ToolError(
            f"{', '.join(options.files)}: no case of a family that is compared over ranks was "
            "measured on two numbers of them; measure one with --ranks 1, 2, …"
        )
    print("\n".join([*(f"note: {note}" for note in results.notes), f"{results.title}\n"]))
    for written in tables:
        print(f"{written.words} Setting: {written.setting}.\n\n{written.table}\n")
    for drawing in drawings if options.out else ():
        contents = zip((".png", ".svg"), render.png_and_svg(drawing), strict=True)
        for suffix, content in contents:
            save(Path(options.out) / f"{drawing.name}{suffix}", content)
        print(f"{Path(options.out) / drawing.name}.png, .svg: {drawing.title}")
    if results.cpu:
        print(f"{CPU_CAVEAT}.")
    return 0


if __name__ == "__main__":
    run(main)
