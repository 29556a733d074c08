"""Which cases a run measures: a YAML file in `sweeps/`, overridden by `--set`.

    about: one line on what the sweep is for
    family: linear                      # or attention, see `attention_sweep`; left out: linear
    phases: [forward, training]         # left out: all
    common:                             # on every device
      dtype: [bf16]
      training: {optimizer: [adam]}     # for one phase only
    cpu:  {N: [256, 512], B: [16]}
    cuda: {N: [4096, 8192], B: [64, 4096]}

Every axis is a list, and every combination is a case. `method` may be `all`. `mask`, `kernel` and
`reduce` may be `all` or `usual`; a list applies to the methods that take one of its names, the
others keep their usual one; and so for `policy`, where the others keep what trains them. Where only
some methods are meant, these axes are a mapping, `mask: {block_shock: [tile, "1100"]}`, and the
others keep their usual one. Later wins: common, device, common's phase, device's phase, `--set`.
"""

import re
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import yaml

from bench import attention_sweep
from blockshock.phases.linear.case import FAMILIES, PHASES, Case, choices

FOLDER = Path(__file__).parent / "sweeps"
AXES = {
    "method": "all",
    "mask": "usual",
    "kernel": "usual",
    "reduce": "usual",
    "N": None,
    "K": [None],
    "B": None,
    "dtype": ["bf16"],
    "input": ["gaussian"],
    "weight": [None],
    "bias": [True],
    "policy": "all",
    "optimizer": ["sgd"],
    "loss": ["mse_target"],
    "target": ["normal"],
    "steps": [8],
    "seed": [0],
}
COMMA = re.compile(r",(?![^(]*\))")  # but for those inside parentheses
CHOSEN = ("mask", "kernel", "reduce", "policy")  # axes of what each method takes of its own
SINGLE = (str, int, float, bool, type(None))
ONLY = {  # axes of one phase
    **dict.fromkeys(("policy", "optimizer", "loss", "target"), "training"),
    "steps": "drift",
}


class SweepError(ValueError):
    """A sweep file or a `--set` that says something impossible."""


class Kind(NamedTuple):
    """What a family's sweeps may say. texts: axes whose values are names, never numbers."""

    axes: dict
    phases: tuple
    texts: tuple
    expand: Callable  # (axes, phase, device, ranks, what --set says) -> cases


def load(name: str) -> dict:
    """The sweep called `name` in bench/sweeps, or the YAML file at that path."""
    file = Path(name)
    if not name.endswith((".yaml", ".yml")):
        file = next(FOLDER.glob(f"*/{name}.yaml"), FOLDER / f"{name}.yaml")
    if not file.exists():
        known = ", ".join(sorted(f.stem for f in FOLDER.glob("*/*.yaml")))
        raise SweepError(f"there is no sweep {name!r}; known: {known}, or give a path to a .yaml")
    try:
        sweep = yaml.safe_load(file.read_text())
    except (OSError, UnicodeError) as error:
        raise SweepError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise SweepError(f"{file} is not YAML: {error}") from None
    if not isinstance(sweep, dict):
        raise SweepError(f"{file} must be a mapping with the keys about, common, cpu, cuda")
    _known_keys(sweep, {"about", "family", "phases", "common", "cpu", "cuda"}, str(file))
    if family(sweep) not in tuple(KINDS):  # which a list may be asked about
        raise SweepError(f"{file}: unknown family {family(sweep)!r}; known: {', '.join(KINDS)}")
    kind = KINDS[family(sweep)]
    for part in ("common", "cpu", "cuda"):
        _check_axes(sweep.get(part) or {}, f"{file}, {part}", kind)
    phases = sweep.get("phases") or kind.phases
    if not isinstance(phases, list | tuple):
        raise SweepError(f"{file}: phases must be a list, such as [{phases}]")
    for phase in phases:
        if phase not in kind.phases:
            raise SweepError(f"{file}: unknown phase {phase!r}; known: {', '.join(kind.phases)}")
    return sweep


def family(sweep: dict) -> str:
    """The family whose cases a sweep lists."""
    return sweep.get("family") or "linear"


def parse_set(settings: list[str], family: str = "linear") -> dict[str, list]:
    """["N=4096,8192"] -> {"N": [4096, 8192]}."""
    axes, kind = {}, KINDS[family]
    for setting in settings:
        key, equals, values = setting.partition("=")
        if not equals or not values:
            raise SweepError(f"--set {setting!r} is not KEY=VALUE[,VALUE...]")
        _known_keys({key: values}, kind.axes.keys() - {"points"}, f"--set {setting}")
        words = COMMA.split(values)
        # A mask such as 0110 or 1100 is a name, not a number.
        try:
            parsed = words if key in kind.texts else [yaml.safe_load(word) for word in words]
        except yaml.YAMLError:
            raise SweepError(
                f"--set {setting!r}: a value is not a number, a name or text"
            ) from None
        axes[key] = parsed[0] if parsed == ["all"] else parsed
    return axes


def cases(sweep: dict, phase: str, device: str, ranks: int, settings: dict) -> list[Case]:
    """The cases of one phase, the methods of a point next to each other."""
    kind = KINDS[family(sweep)]
    if phase not in (sweep.get("phases") or kind.phases):
        return []
    parts = [sweep.get("common") or {}, sweep.get(device) or {}]
    axes = dict(kind.axes)
    for part in (*parts, *(part.get(phase) or {} for part in parts), settings):
        axes.update({key: value for key, value in part.items() if key in kind.axes})
    try:
        found = kind.expand(axes, phase, device, ranks, settings)
    except SweepError:
        raise
    except ValueError as error:
        raise SweepError(str(error)) from None
    twice = [name for name, count in Counter(case.id for case in found).items() if count > 1]
    if twice:
        raise SweepError(f"the sweep lists {twice[0]} twice; every value of an axis once")
    return found


def _linear(axes: dict, phase: str, device: str, ranks: int, settings: dict) -> list[Case]:
    """Every combination of the axes."""
    axes = {key: _listed(key, value, device) for key, value in axes.items()}
    _check_names(axes)
    fixed = ("method", *CHOSEN, *(k for k, only in ONLY.items() if only != phase))
    names = [key for key in axes if key not in fixed]
    found = []
    for values in product(*(axes[name] for name in names)):
        point = dict(zip(names, values, strict=True), phase=phase, ranks=ranks)
        found += _methods(point, axes, phase)
    return found


def _methods(point: dict, axes: dict, phase: str) -> list[Case]:
    """The cases of all methods at one point, each with what it takes of the axes of `CHOSEN`."""
    methods = FAMILIES["linear"]
    found = []
    for method in methods if axes["method"] == ["all"] else axes["method"]:
        if method not in methods:
            raise SweepError(f"unknown method {method!r}; known: {', '.join(methods)}")
        taken = [_of_axis(key, axes[key], method, phase) for key in CHOSEN]
        for values in product(*taken):
            own = dict(zip(CHOSEN, values, strict=True))
            found.append(Case(method=method, **own, **point))
    return found


def _of_axis(key: str, axis: list | dict, method: str, phase: str) -> tuple:
    """The values of one axis of `CHOSEN` that a method is measured with."""
    if ONLY.get(key, phase) != phase:
        return (None,)
    taken = _taken(FAMILIES["linear"][method], key)
    usual = taken[:1]
    if key == "policy":
        usual = tuple(policy for policy in taken if policy != "frozen")
    wanted = axis.get(method, []) if isinstance(axis, dict) else axis
    return _chosen(wanted, taken, usual) or (None,)


def _chosen(wanted: list, taken: tuple, usual: tuple) -> tuple:
    """What a method is measured with, of what it takes: all, the listed, or else its usual."""
    if "all" in wanted:
        return taken
    if "usual" in wanted:
        wanted = [*wanted, *usual]
    return tuple(name for name in taken if name in wanted) or usual


def _check_names(axes: dict) -> None:
    """Names that no method takes would be left out without a word."""
    methods = FAMILIES["linear"]
    for key in CHOSEN:
        axis = axes[key]
        for method, names in axis.items() if isinstance(axis, dict) else ((None, axis),):
            if method is not None and method not in methods:
                raise SweepError(f"{key}: unknown method {method!r}; known: {', '.join(methods)}")
            takers = methods.values() if method is None else [methods[method]]
            known = {"all", "usual"}.union(*(_taken(cls, key) for cls in takers))
            for name in names:
                if not isinstance(name, str):
                    raise SweepError(f"{key} {name!r} is no name; put it in quotes")
                if name not in known:
                    valid = ", ".join(sorted(known))
                    raise SweepError(f"unknown {key} {name!r}; known: {valid}")


def _taken(cls, key: str) -> tuple:
    return tuple(cls.policies) if key == "policy" else choices(cls, key)


def _listed(key: str, value, device: str) -> list | dict:
    if value is None:
        raise SweepError(f"the sweep says no {key} for {device}; add it, or use --set {key}=...")
    if isinstance(value, dict) and key in CHOSEN:
        return {method: _listed(key, names, device) for method, names in value.items()}
    values = value if isinstance(value, list) else [value]
    for single in values:
        if not isinstance(single, SINGLE):
            raise SweepError(f"{key}: {single!r} is not one number, name or text")
    return values


def _check_axes(part: dict, where: str, kind: Kind) -> None:
    _known_keys(part, {*kind.axes, *kind.phases}, where)
    for phase in kind.phases:
        _known_keys(part.get(phase) or {}, kind.axes, f"{where}, {phase}")


def _known_keys(mapping: dict, known, where: str) -> None:
    if not isinstance(mapping, dict):
        raise SweepError(f"{where} must be a mapping of axes to values, and is {mapping!r}")
    for key in mapping:
        if key not in known:
            raise SweepError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")


KINDS = {
    "linear": Kind(AXES, PHASES, CHOSEN, _linear),
    "attention": Kind(attention_sweep.AXES, attention_sweep.PHASES, (), attention_sweep.expand),
}
