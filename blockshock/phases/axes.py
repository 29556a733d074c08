"""What a sweep may say of a family's cases, read from their fields; and every combination of it.

Every field is an axis, but for what the run itself decides (`GIVEN`). Axes that say nothing mean
the field's default, or what its `axis` says.
"""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from itertools import product

from blockshock.phases.case import Case

GIVEN = ("family", "phase", "ranks")
SINGLE = (str, int, float, bool, type(None))


def of(case: type[Case]) -> dict:
    """Axis -> the field behind it."""
    return {f.name: f for f in fields(case) if f.name not in GIVEN}


def defaults(case: type[Case]) -> dict:
    """Axis -> what a sweep means where it says nothing; None where it has to say something."""
    return {
        name: f.metadata.get("axis", None if f.default is MISSING else [f.default])
        for name, f in of(case).items()
    }


def listed(case: type[Case], axes: dict, device: str) -> dict:
    """The axes, each as a list, or as lists by method. Raises ValueError for what is none."""
    per_method = [name for name, f in of(case).items() if f.metadata.get("per_method")]
    found = {}
    for name, value in axes.items():
        if name in per_method and isinstance(value, dict):
            for method in value:
                known_method(case, method, f"{name}: ")
            found[name] = {method: _values(name, names, device) for method, names in value.items()}
        else:
            found[name] = _values(name, value, device)
    if found["method"] == ["all"]:
        found["method"] = list(case.methods)
    for method in found["method"]:
        known_method(case, method)
    return found


def combine(
    case: type[Case],
    axes: dict,
    phase: str,
    ranks: int,
    chosen: Callable[[str], Iterable[dict]] = lambda method: [{}],
) -> list[Case]:
    """Every combination of the listed axes, the methods of a point next to each other.

    chosen: a method's combinations of the axes that are `per_method`.
    """
    names = [
        name
        for name, f in of(case).items()
        if name != "method"
        and not f.metadata.get("per_method")
        and phase in f.metadata.get("only", (phase,))
    ]
    return [
        case(
            phase=phase, method=method, ranks=ranks, **dict(zip(names, values, strict=True)), **own
        )
        for values in product(*(axes[name] for name in names))
        for method in axes["method"]
        for own in chosen(method)
    ]


def known_method(case: type[Case], method, where: str = "") -> None:
    """Raises ValueError for a method that the family does not have."""
    if method not in case.methods:
        raise ValueError(f"{where}unknown method {method!r}; known: {', '.join(case.methods)}")


def _values(name: str, value, device: str) -> list:
    if value is None:
        raise ValueError(f"the sweep says no {name} for {device}; add it, or use --set {name}=...")
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{name} is an empty list; name a value, or leave {name} out")
    for single in values:
        if not isinstance(single, SINGLE):
            raise ValueError(f"{name}: {single!r} is not one number, name or text")
    return values
