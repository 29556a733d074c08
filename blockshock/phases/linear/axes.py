"""What each method of linear layers is measured with, where it has choices of its own.

`mask`, `kernel` and `reduce` may be `all` or `usual`; a list applies to the methods that take one
of its names, the others keep their usual one; and so for `policy`, where the others keep what
trains them. Where only some methods are meant, these axes are a mapping,
`mask: {block_shock: [tile, "1100"]}`, and the others keep their usual one.
"""

from itertools import product

from blockshock.phases.axes import combine, of
from blockshock.phases.linear.case import CHOICES, LinearCase, choices


def expand(case: type[LinearCase], axes: dict, phase: str, ranks: int) -> list[LinearCase]:
    """Every combination of the axes, each method with what it takes."""
    _check_names(axes)

    def chosen(method):
        taken = [_of_axis(name, axes[name], method, phase) for name in CHOICES]
        return [dict(zip(CHOICES, values, strict=True)) for values in product(*taken)]

    return combine(case, axes, phase, ranks, chosen)


def _of_axis(name: str, axis: list | dict, method: str, phase: str) -> tuple:
    """The values of one axis that a method is measured with: all, the listed, or its usual."""
    if phase not in of(LinearCase)[name].metadata.get("only", (phase,)):
        return (None,)
    taken = choices(LinearCase.methods[method], name)
    usual = taken[:1]
    if name == "policy":
        usual = tuple(policy for policy in taken if policy != "frozen")
    wanted = axis.get(method, []) if isinstance(axis, dict) else axis
    if "all" in wanted:
        return taken or (None,)
    if "usual" in wanted:
        wanted = [*wanted, *usual]
    return tuple(value for value in taken if value in wanted) or usual or (None,)


def _check_names(axes: dict) -> None:
    """Names that no method takes would be left out without a word."""
    methods = LinearCase.methods
    for axis in CHOICES:
        by_method = axes[axis] if isinstance(axes[axis], dict) else {None: axes[axis]}
        for method, names in by_method.items():
            takers = methods.values() if method is None else [methods[method]]
            known = {"all", "usual"}.union(*(choices(cls, axis) for cls in takers))
            for name in names:
                if not isinstance(name, str):
                    raise ValueError(f"{axis} {name!r} is no name; put it in quotes")
                if name not in known:
                    valid = ", ".join(sorted(known))
                    raise ValueError(f"unknown {axis} {name!r}; known: {valid}")
