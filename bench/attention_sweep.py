"""The cases of a sweep of attention.

    family: attention
    cuda:
      heads: [16]
      D: [64, 128]
      causal: [false, true]
      points:                                   # left out: the axes above alone
        - {tier: small, Tq: 128, batch: 32}
        - {tier: band, Tq: 4096, batch: 4, D: 128, causal: false, pattern: ["band(256)", full()]}

Every combination of the axes is a point; where `points` are listed, each of them is a mapping that
replaces some of the axes, and every combination of those is. `--set` replaces axes in all points;
what is then the same in two of them is measured once.
"""

from itertools import product

from blockshock.attention import METHODS
from blockshock.phases.attention.case import PHASES, SIZES, AttentionCase

__all__ = ["AXES", "PHASES", "expand"]

AXES = {
    "method": "all",
    "batch": None,
    "heads": None,
    "kv_heads": [None],
    "Tq": None,
    "Tk": [None],
    "D": None,
    "dtype": ["bf16"],
    "causal": [False],
    "pattern": [None],
    "tier": [None],
    "seed": [0],
    "points": [{}],
}


def expand(axes: dict, phase: str, device: str, ranks: int, settings: dict) -> list[AttentionCase]:
    """The cases of one phase, the methods of a point next to each other.

    Raises ValueError for what no case can be.
    """
    axes, found, seen = dict(axes), [], set()
    for point in _points(axes.pop("points")):
        own = {**axes, **point, **settings}
        if settings.keys() & set(SIZES) and "tier" not in settings:
            own["tier"] = [None]  # a label of other sizes
        of_point = _combinations(own, phase, device, ranks)
        found += [case for case in of_point if not settings or case.id not in seen]
        seen |= {case.id for case in of_point}
    return found


def _combinations(axes: dict, phase: str, device: str, ranks: int) -> list[AttentionCase]:
    listed = {name: _listed(name, values, device) for name, values in axes.items()}
    methods = listed.pop("method")
    methods = list(METHODS) if methods == ["all"] else methods
    return [
        AttentionCase(
            phase=phase, method=method, ranks=ranks, **dict(zip(listed, values, strict=True))
        )
        for values in product(*listed.values())
        for method in methods
    ]


def _points(points) -> list[dict]:
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise ValueError(f"points must be a list of mappings of axes to values, and is {points!r}")
    for point in points:
        for key in point:
            if key not in AXES or key == "points":
                known = ", ".join(sorted(set(AXES) - {"points"}))
                raise ValueError(f"points: unknown key {key!r}; known: {known}")
    return points


def _listed(name: str, values, device: str) -> list:
    if values is None:
        raise ValueError(f"the sweep says no {name} for {device}; add it, or use --set {name}=...")
    values = values if isinstance(values, list) else [values]
    for value in values:
        if isinstance(value, list | dict):
            raise ValueError(f"{name}: {value!r} is not one number, name or text")
    return values
