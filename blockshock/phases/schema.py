"""SCHEMA's tables of cases and phases, written from where they are declared.

    python -m blockshock.phases.schema [--check] [FILE]

Replaces what stands between `<!-- cases -->` and `<!-- /cases -->` in FILE, tools/SCHEMA.md if left
out; with --check it writes nothing, and ends with 1 where the text is another.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from types import NoneType

from blockshock.phases import axes
from blockshock.phases.case import types
from blockshock.phases.families import FAMILIES
from blockshock.phases.family import Family

BEGIN, END = "<!-- cases -->\n", "<!-- /cases -->\n"


def tables() -> str:
    """A section for each family."""
    return "\n".join(_section(name, family) for name, family in FAMILIES.items())


def replaced(text: str) -> str:
    """The text with today's tables between its markers. Raises ValueError without markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"has no {BEGIN.strip()} and {END.strip()}, each on a line of its own")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default="tools/SCHEMA.md", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it is not so")
    options = parser.parse_args(arguments)
    try:
        old = options.file.read_text(encoding="utf-8")
        new = replaced(old)
        if new != old and not options.check:
            options.file.write_text(new, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 2
    if options.check and new != old:
        told = "is not what the cases say; run python -m blockshock.phases.schema"
        print(f"{options.file} {told}", file=sys.stderr)
        return 1
    return 0


def _section(name: str, family: Family) -> str:
    usual = axes.defaults(family.case)
    lines = [f"### {name}", "", "| phase | one sample is the time of |", "|---|---|"]
    for phase, function in family.phases.items():
        lines.append(f"| `{phase}` | {function.__doc__.splitlines()[0].rstrip('.')} |")
    lines += [
        "",
        "| field | meaning | values | a sweep that does not say it |",
        "|---|---|---|---|",
    ]
    for declared in fields(family.case):
        meaning = declared.metadata["about"]
        if "only" in declared.metadata:
            meaning += f"; only in {' and '.join(declared.metadata['only'])}"
        cells = [f"`{declared.name}`", meaning, _values(declared, family), _usual(declared, usual)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _values(declared, family: Family) -> str:
    names = declared.metadata.get("names")
    names = {"phase": family.phases, "method": family.case.methods}.get(declared.name, names)
    wanted = types(declared)
    if declared.name == "family":
        values = f"`{declared.default}`"
    elif names:
        values = ", ".join(f"`{name}`" for name in names)
    elif bool in wanted:
        values = "true, false"
    elif int in wanted:
        values = f"a whole number, {declared.metadata.get('least', 1)} or more"
    elif float in wanted:
        values = "a number"
    else:
        values = "text"
    return f"{values}, or null" if NoneType in wanted else values


def _usual(declared, usual: dict) -> str:
    if declared.name in axes.GIVEN:
        return "is not asked"
    values = usual[declared.name]
    if values is None:
        return "is refused"
    return ", ".join(
        f"`{value if isinstance(value, str) else json.dumps(value)}`" for value in values
    )


if __name__ == "__main__":
    sys.exit(main())
