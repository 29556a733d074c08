"""Which cases a run measures: a YAML file in `sweeps/`, overridden by `--set`.

    about: one line on what the sweep is for
    phases: [forward, training]         # left out: all
    common:                             # on every device
      dtype: [bf16]
      training: {optimizer: [adam]}     # for one phase only
    cpu:  {N: [256, 512], B: [16]}
    cuda: {N: [4096, 8192], B: [64, 4096]}

Every axis is a list, and every combination is a case. `method` and `mask` may be `all`; a mask list
applies to the methods that take one of its masks, the others keep their usual one, and so for
`policy`. Later wins: common, device, common's phase, device's phase, `--set`.
"""

from itertools import product
from pathlib import Path

import yaml

from blockshock.phases.case import FAMILIES, PHASES, Case

FOLDER = Path(__file__).parent / "sweeps"
AXES = {
    "method": "all",
    "mask": "usual",
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
    "steps": [8],
    "seed": [0],
}
ONLY = {"policy": "training", "optimizer": "training", "loss": "training", "steps": "drift"}


class SweepError(ValueError):
    """A sweep file or a `--set` that says something impossible."""


def load(name: str) -> dict:
    """The sweep called `name` in bench/sweeps, or the YAML file at that path."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not file.exists():
        known = ", ".join(sorted(f.stem for f in FOLDER.glob("*.yaml")))
        raise SweepError(f"there is no sweep {name!r}; known: {known}, or give a path to a .yaml")
    try:
        sweep = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise SweepError(f"{file} is not YAML: {error}") from None
    if not isinstance(sweep, dict):
        raise SweepError(f"{file} must be a mapping with the keys about, common, cpu, cuda")
    _known_keys(sweep, {"about", "phases", "common", "cpu", "cuda"}, str(file))
    for part in ("common", "cpu", "cuda"):
        _check_axes(sweep.get(part) or {}, f"{file}, {part}")
    for phase in sweep.get("phases") or PHASES:
        if phase not in PHASES:
            raise SweepError(f"{file}: unknown phase {phase!r}; known: {', '.join(PHASES)}")
    return sweep


def parse_set(settings: list[str]) -> dict[str, list]:
    """["N=4096,8192"] -> {"N": [4096, 8192]}."""
    axes = {}
    for setting in settings:
        key, equals, values = setting.partition("=")
        if not equals or not values:
            raise SweepError(f"--set {setting!r} is not KEY=VALUE[,VALUE...]")
        _known_keys({key: values}, AXES, f"--set {setting}")
        words = values.split(",")
        # A mask such as 0110 or 1100 is a name, not a number.
        parsed = words if key == "mask" else [yaml.safe_load(word) for word in words]
        axes[key] = parsed[0] if parsed == ["all"] else parsed
    return axes


def cases(sweep: dict, phase: str, device: str, ranks: int, settings: dict) -> list[Case]:
    """The cases of one phase, the methods of a point next to each other."""
    if phase not in (sweep.get("phases") or PHASES):
        return []
    parts = [sweep.get("common") or {}, sweep.get(device) or {}]
    axes = dict(AXES)
    for part in (*parts, *(part.get(phase) or {} for part in parts), settings):
        axes.update({key: value for key, value in part.items() if key in AXES})
    axes = {key: _listed(key, value, device) for key, value in axes.items()}
    fixed = ("method", "mask", "policy", *(k for k, only in ONLY.items() if only != phase))
    names = [key for key in axes if key not in fixed]
    found = []
    for values in product(*(axes[name] for name in names)):
        point = dict(zip(names, values, strict=True), phase=phase, ranks=ranks)
        found += _methods(point, axes, phase)
    return found


def _methods(point: dict, axes: dict, phase: str) -> list[Case]:
    """The cases of all methods, masks and policies at one point."""
    methods = FAMILIES["linear"]
    found = []
    for method in methods if axes["method"] == ["all"] else axes["method"]:
        if method not in methods:
            raise SweepError(f"unknown method {method!r}; known: {', '.join(methods)}")
        cls = methods[method]
        policies = _chosen(axes["policy"], tuple(cls.policies)) if phase == "training" else (None,)
        for mask, policy in product(_chosen(axes["mask"], cls.masks), policies):
            try:
                found.append(Case(method=method, mask=mask, policy=policy, **point))
            except ValueError as error:
                raise SweepError(str(error)) from None
    return found


def _chosen(wanted: list, taken: tuple) -> tuple:
    """What a method is measured with, of what it takes: all, the usual (first), or the listed."""
    if not taken:
        return (None,)
    if wanted == ["all"]:
        return taken
    return tuple(name for name in taken if name in wanted) or taken[:1]


def _listed(key: str, value, device: str) -> list:
    if value is None:
        raise SweepError(f"the sweep says no {key} for {device}; add it, or use --set {key}=...")
    return value if isinstance(value, list) else [value]


def _check_axes(part: dict, where: str) -> None:
    _known_keys(part, {*AXES, *PHASES}, where)
    for phase in PHASES:
        _known_keys(part.get(phase) or {}, AXES, f"{where}, {phase}")


def _known_keys(mapping: dict, known, where: str) -> None:
    for key in mapping:
        if key not in known:
            raise SweepError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")
