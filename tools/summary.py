"""The README's tables and the full tables of the results, from the results themselves.

    python -m tools.summary FILE... [--readme README.md] [--tables results/README.md] [--check]

Files of one device and number of ranks are read as one set. --readme writes one short table a
family between the lines <!-- FAMILY:begin --> and <!-- FAMILY:end -->, from the first set that has
the family; a family without such lines is left out, and so is told. --tables writes a whole file:
every table and verdict of every set, in the order given, and then what sets of one kind of GPU show
over ranks. With neither the full tables are printed.
--check writes nothing and exits with 1 where a file is not what these results give.
"""

from collections.abc import Sequence
from pathlib import Path

from tools.cases import CPU_CAVEAT, Results
from tools.families import held
from tools.family import Written
from tools.files import ToolError, parser, read_text, run, save
from tools.results import load, load_by_card, load_by_device
from tools.verdict import judged, line

INTRODUCTION = (
    "Every figure was measured on the card and at the commit that its set names. This file is "
    "written by `python -m tools.summary FILES --tables`, never by hand."
)


def readme_tables(sets: list[Results]) -> dict[str, str]:
    """The README's table of each family with its caption, from the first set that has one."""
    made: dict[str, str] = {}
    for results in sets:
        for name, (family, own) in held(results).items():
            written = family.readme(own) if name not in made else None
            if written:
                made[name] = _with_caption(written, results, f"{_facts(results)}.")
    return made


def tables_of_files(paths: Sequence[str]) -> dict[str, str]:
    """`readme_tables`, each of the files that hold its family and so have its facts."""
    families = {path: held(load(path)) for path in paths}
    made: dict[str, str] = {}
    for name in dict.fromkeys(name for found in families.values() for name in found):
        own = load_by_device(path for path, found in families.items() if name in found)
        written = readme_tables(own).get(name)
        made |= {name: written} if written else {}
    return made


def replaced(readme: str, tables: dict[str, str], path: str) -> tuple[str, list[str]]:
    """`readme` with each table between its family's markers, and a line for each that has none.

    Raises ToolError where no family has its markers, or one has them twice or in the wrong order.
    """
    left = []
    for name, table in tables.items():
        begin, end = (f"<!-- {name}:{part} -->" for part in ("begin", "end"))
        counts = readme.count(begin), readme.count(end)
        if counts == (0, 0):
            left.append(f"{path} has no lines {begin} and {end}: {name} is left out")
            continue
        if counts != (1, 1):
            raise ToolError(
                f"{path} has {counts[0]} lines {begin} and {counts[1]} lines {end}: one of each is "
                "needed, where the table belongs"
            )
        if readme.index(begin) > readme.index(end):
            raise ToolError(f"{path} has {end} before {begin}: exchange them")
        head, rest = readme.split(begin)
        readme = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    if len(left) == len(tables):
        raise ToolError(
            f"{path} has no place for the tables of {', '.join(tables) or 'these results'}: put "
            "<!-- FAMILY:begin --> and <!-- FAMILY:end --> where a table belongs"
        )
    return readme, left


def full_tables(sets: list[Results], cards: Sequence[Results] = ()) -> str:
    """Every table and verdict of every set, then those over ranks, as a Markdown page.

    cards: the same results, by kind of GPU.
    """
    parts = ["# Results", INTRODUCTION]
    for results in sets:
        files = ", ".join(f"`{Path(file).name}`" for file in results.files)
        parts += [f"## {_device(results)}", f"{_facts(results)}. Files: {files}."]
        for family, own in held(results).values():
            parts.append(f"### {family.title}")
            for written in family.full(own):
                parts.append(_with_caption(written, results, ""))
        for verdict in judged(results):
            lines = [f"- {line(judgement)}" for judgement in verdict.deciding]
            if lines:
                parts += [f"**{verdict.name}**: *{verdict.claim}*", "\n".join(lines)]
    for results in cards:
        tables = [
            _with_caption(written, results, "")
            for family, own in held(results).values()
            if family.scaling
            for written in family.scaling.tables(own)
        ]
        if tables:
            parts += [f"## {_device(results)}, over ranks", *tables]
    return "\n\n".join(parts) + "\n"


def _with_caption(written: Written, results: Results, facts: str) -> str:
    caveat = f"**{CPU_CAVEAT}.**" if results.cpu else ""
    setting = f"Setting: {written.setting}." if written.setting else ""
    caption = " ".join(part for part in (caveat, written.words, setting, facts) if part)
    return f"{caption}\n\n{written.table}"


def _facts(results: Results) -> str:
    """Where figures come from: card, caches, versions, commits, dates."""
    commits = f"commit {', '.join(results.commits)}" if results.commits else "commit unknown"
    cold = "cold L2" if "cold" in results.caches else ""
    facts = (_device(results), cold, results.versions, commits, results.days)
    return "; ".join(fact for fact in facts if fact)


def _device(results: Results) -> str:
    ranks = results.machine.get("ranks")
    several = isinstance(ranks, int) and ranks > 1 and not results.cpu
    return results.device + (f", {ranks} ranks" if several else "")


def main(argv: list[str]) -> int:
    command = parser("summary", __doc__)
    command.add_argument("--readme", metavar="FILE", help="write one short table a family into it")
    command.add_argument("--tables", metavar="FILE", help="write every table of every set to it")
    command.add_argument(
        "--check", action="store_true", help="only say whether they are up to date"
    )
    options = command.parse_args(argv)
    if options.check and not (options.readme or options.tables):
        raise ToolError("--check needs --readme FILE or --tables FILE: it compares that file")
    sets, cards = load_by_device(options.files), load_by_card(options.files)
    for results in sets:
        for note in results.notes:
            print(f"note: {note}")
    made: dict[str, str] = {}
    if options.readme:
        before = read_text(options.readme)
        made[options.readme], left = replaced(
            before, tables_of_files(options.files), options.readme
        )
        print(*left, sep="\n", end="\n" * bool(left))
    if options.tables:
        made[options.tables] = full_tables(sets, cards)
    if not made:
        print(full_tables(sets, cards), end="")
    late = False
    for path, text in made.items():
        old = Path(path).exists() and read_text(path) == text
        late |= not old
        if options.check:
            print(f"{path} is {'up to date' if old else 'out of date'}")
            continue
        if not old:
            save(path, text)
        print(f"{path} has the tables of {', '.join(options.files)}")
    return int(options.check and late)


if __name__ == "__main__":
    run(main)
