"""Which families a run asks, with how many ranks, and the cases of each of their phases.

A family is asked where one of its bench files is among the paths that pytest is given:
bench_<family>.py, or what its `benches` name.
"""

from dataclasses import dataclass
from pathlib import Path

from bench import sweep as sweeps
from blockshock.phases.families import FAMILIES

BENCH = Path(__file__).parent
# The name of a bench file -> the family that it asks.
BENCHES = {bench: name for name, one in FAMILIES.items() for bench in (name, *one.benches)}


@dataclass
class Plan:
    """cases: by (family, phase). left_out: a line for each family that is asked in vain."""

    cases: dict[tuple[str, str], list]
    left_out: list[str]


def families(paths: list[str], folder: Path) -> list[str]:
    """The families whose bench files the paths name, or hold; relative paths begin in `folder`."""
    given = [(folder / path.partition("::")[0]).resolve() for path in paths]
    asked = {
        name
        for bench, name in BENCHES.items()
        if any(_holds(path, f"bench_{bench}.py") for path in given)
    }
    return [name for name in FAMILIES if name in asked]


def ranks(asked: list[str]) -> int:
    """How many ranks are meant where nothing says so."""
    numbers = {FAMILIES[name].ranks for name in asked}
    return numbers.pop() if len(numbers) == 1 and None not in numbers else 2


def plan(asked: list[str], sweep: str, settings: list[str], device: str, ranks: int) -> Plan:
    """The cases that the asked families have in the sweep.

    A family is left out that cannot be measured with so many ranks, has no such sweep, or does not
    know an axis or a method of `settings`. Raises ValueError or ImportError where all are, and
    where a sweep or a case's data is wrong.
    """
    cases, left_out = {}, {}
    loaded = sweeps.load(sweep, [name for name in asked if FAMILIES[name].ranks in (None, ranks)])
    for name in asked:
        family = FAMILIES[name]
        if family.ranks not in (None, ranks):
            left_out[name] = (
                f"it is measured on {family.ranks} rank{'s' if family.ranks > 1 else ''}, and "
                f"{ranks} run; use pytest bench/bench_{name}.py --ranks {family.ranks}"
            )
        elif name not in loaded:
            left_out[name] = f"no sweep {sweep} is of this family"
        else:
            try:
                given = sweeps.parse_set(settings, name)
            except ValueError as error:
                left_out[name] = str(error)
                continue
            of_phases = {
                (name, phase): sweeps.cases(loaded[name], phase, device, ranks, given)
                for phase in family.phases
            }
            family.check_all([case for listed in of_phases.values() for case in listed])
            cases |= of_phases
    told = [f"{name} is left out: {why}" for name, why in left_out.items()]
    if left_out and len(left_out) == len(asked):
        raise ValueError(told[0])
    return Plan(cases, told)


def family_of(path: Path) -> str:
    """The family that a bench file asks, by its name."""
    name = path.stem.removeprefix("bench_")
    return BENCHES.get(name, name)


def wrong_name(family: str, phase: str) -> str | None:
    """Why bench_<family>.py, bench_<phase> asks nothing, or None."""
    if family not in FAMILIES:
        return f"there is no family {family!r}; known: {', '.join(FAMILIES)}"
    phases = FAMILIES[family].phases
    return None if phase in phases else f"there is no phase {phase!r}; known: {', '.join(phases)}"


def _holds(path: Path, name: str) -> bool:
    if path.name == name:
        return path.is_file()
    return (path / name).is_file() or (path in BENCH.parents and (BENCH / name).is_file())
