"""Which cases a run measures: a YAML file in `sweeps/`, overridden by `--set`.

    about: one line on what the sweep is for
    phases: [forward, training]         # left out: all
    common:                             # on every device
      dtype: [bf16]
      training: {optimizer: [adam]}     # for one phase only
    cpu:  {N: [256, 512], B: [16]}
    cuda: {N: [4096, 8192], B: [64, 4096]}

Every axis is a list, and every combination is a case. `method` and `mask` may be `all`; a mask list
applies to the methods that take one of its masks, the others keep their usual one; and so for
`policy`, where the others keep what trains them. Later wins: common, device, common's phase,
device's phase, `--set`.
"""

from collections import Counter
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
    "target": ["normal"],
    "steps": [8],
    "seed": [0],
}
ONLY = {  # axes of one phase
    **dict.fromkeys(("policy", "optimizer", "loss", "target"), "training"),
    "steps": "drift",
}


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
    _check_names(axes)
    fixed = ("method", "mask", "policy", *(k for k, only in ONLY.items() if only != phase))
    names = [key for key in axes if key not in fixed]
    found = []
    for values in product(*(axes[name] for name in names)):
        point = dict(zip(names, values, strict=True), phase=phase, ranks=ranks)
        found += _methods(point, axes, phase)
    twice = [name for name, count in Counter(case.id for case in found).items() if count > 1]
    if twice:
        raise SweepError(f"the sweep lists {twice[0]} twice; every value of an axis once")
    return found


def _methods(point: dict, axes: dict, phase: str) -> list[Case]:
    """The cases of all methods, masks and policies at one point."""
    methods = FAMILIES["linear"]
    found = []
    for method in methods if axes["method"] == ["all"] else axes["method"]:
        if method not in methods:
            raise SweepError(f"unknown method {method!r}; known: {', '.join(methods)}")
        cls = methods[method]
        masks = _chosen(axes["mask"], cls.masks, cls.masks[:1]) or (None,)
        policies = (None,)
        if phase == "training":
            training = tuple(policy for policy in cls.policies if policy != "frozen")
            policies = _chosen(axes["policy"], tuple(cls.policies), training)
        for mask, policy in product(masks, policies):
            try:
                found.append(Case(method=method, mask=mask, policy=policy, **point))
            except ValueError as error:
                raise SweepError(str(error)) from None
    return found


def _chosen(wanted: list, taken: tuple, usual: tuple) -> tuple:
    """What a method is measured with, of what it takes: all, the listed, or else its usual."""
    if wanted == ["all"]:
        return taken
    return tuple(name for name in taken if name in wanted) or usual


def _check_names(axes: dict) -> None:
    """Masks and policies that no method takes would be left out without a word."""
    methods = FAMILIES["linear"].values()
    for key, known in (
        ("mask", {"all", "usual"}.union(*(cls.masks for cls in methods))),
        ("policy", {"all"}.union(*(cls.policies for cls in methods))),
    ):
        for name in axes[key]:
            if name not in known:
                raise SweepError(f"unknown {key} {name!r}; known: {', '.join(sorted(known))}")


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
