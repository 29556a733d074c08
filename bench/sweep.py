"""Which cases a run measures: a YAML file in `sweeps/<family>/`, overridden by `--set`.

    about: one line on what the sweep is for
    phases: [forward, training]         # left out: all
    common:                             # on every device
      dtype: [bf16]
      training: {optimizer: [adam]}     # for one phase only
    cpu:  {N: [256, 512], B: [16]}
    cuda:
      N: [4096, 8192]
      points:                           # left out: the axes above alone
        - {B: 64}
        - {B: 4096, N: 16384}

A file elsewhere, given by its path, says its `family`; left out, it is the first one of `FAMILIES`.
The axes are the fields of the family's case (`phases.axes`). Each is a list, and every combination
is a case; `method` may be `all`. Where `points` are listed, each replaces some of the axes, and
every combination of those is a case. Later wins: common, device, common's phase, device's phase,
the point, `--set`; what is then the same in two points is measured once.
"""

import re
from collections import Counter
from pathlib import Path
from types import NoneType

import yaml

from blockshock.phases import axes
from blockshock.phases.case import Case, types
from blockshock.phases.families import FAMILIES

FOLDER = Path(__file__).parent / "sweeps"
COMMA = re.compile(r",(?![^(]*\))")  # but for those inside parentheses
PARTS = ("common", "cpu", "cuda")


def load(name: str, families: list[str]) -> dict[str, dict]:
    """By family, of those that are asked: its sweep `name`, or the one in the YAML file at a path.

    A family without a sweep of that name is left out. Raises ValueError where none has one.
    """
    if name.endswith((".yaml", ".yml")):
        file = Path(name)
        if not file.exists():
            raise ValueError(f"there is no sweep {name!r}; give the path of a .yaml that exists")
        sweep = _read(file)
        return {sweep["family"]: sweep} if sweep["family"] in families else {}
    found = {family: FOLDER / family / f"{name}.yaml" for family in families}
    found = {family: _read(file) for family, file in found.items() if file.exists()}
    if families and not found:
        files = [file for family in families for file in (FOLDER / family).glob("*.yaml")]
        names = ", ".join(sorted({file.stem for file in files}))
        raise ValueError(
            f"there is no sweep {name!r} of {', '.join(families)}; known: {names}, or give a path "
            "to a .yaml"
        )
    return found


def parse_set(settings: list[str], family: str) -> dict[str, list]:
    """["N=4096,8192"] -> {"N": [4096, 8192]}."""
    found, case = {}, FAMILIES[family].case
    declared = axes.of(case)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not text:
            raise ValueError(f"--set {setting!r} is not KEY=VALUE[,VALUE...]")
        _known_keys({key: text}, declared, f"--set {setting}")
        words = COMMA.split(text)
        try:
            values = [_value(word, types(declared[key])) for word in words]
        except yaml.YAMLError:
            raise ValueError(
                f"--set {setting!r}: a value is not a number, a name or text"
            ) from None
        if key == "method" and values != ["all"]:
            for method in values:
                axes.known_method(case, method)
        found[key] = values
    return found


def cases(sweep: dict, phase: str, device: str, ranks: int, settings: dict) -> list[Case]:
    """The cases of one phase, the methods of a point next to each other."""
    family = FAMILIES[sweep["family"]]
    if phase not in sweep["phases"]:
        return []
    parts = [sweep.get("common") or {}, sweep.get(device) or {}]
    said = {"points": [{}], **axes.defaults(family.case)}
    for part in (*parts, *(part.get(phase) or {} for part in parts)):
        said.update({key: value for key, value in part.items() if key in said})
    found, seen = [], set()
    for point in _points(said.pop("points"), family.case):
        own = {**said, **point, **_unlabelled(settings, family.case), **settings}
        listed = axes.listed(family.case, own, device)
        of_point = family.expand(family.case, listed, phase, ranks)
        found += [case for case in of_point if not settings or case.id not in seen]
        seen |= {case.id for case in of_point}
    twice = [name for name, count in Counter(case.id for case in found).items() if count > 1]
    if twice:
        raise ValueError(f"the sweep lists {twice[0]} twice; every value of an axis once")
    return found


def _read(file: Path) -> dict:
    """The sweep in a file, checked, with its family."""
    try:
        text = file.read_text()
        _each_key_once(yaml.compose(text, yaml.SafeLoader), file)
        sweep = yaml.safe_load(text)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    if not isinstance(sweep, dict):
        raise ValueError(f"{file} must be a mapping with the keys about, common, cpu, cuda")
    _known_keys(sweep, {"about", "family", "phases", *PARTS}, str(file))
    folder = file.resolve().parent
    usual = folder.name if folder.parent == FOLDER else next(iter(FAMILIES))
    name = sweep.setdefault("family", usual)
    if name not in tuple(FAMILIES):  # which a list may be asked about
        raise ValueError(f"{file}: unknown family {name!r}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    known = {*axes.of(family.case), "points"}
    for part in PARTS:
        _known_keys(sweep.get(part) or {}, {*known, *family.phases}, f"{file}, {part}")
        for phase in family.phases:
            _known_keys((sweep.get(part) or {}).get(phase) or {}, known, f"{file}, {part}, {phase}")
    phases = sweep.setdefault("phases", list(family.phases))
    if not isinstance(phases, list) or not phases:
        raise ValueError(
            f"{file}: phases must be a list, such as [forward], and is {phases!r}; leave it out "
            "for all"
        )
    for phase in phases:
        if phase not in family.phases:
            raise ValueError(f"{file}: unknown phase {phase!r}; known: {', '.join(family.phases)}")
    return sweep


def _each_key_once(node: yaml.Node | None, file: Path) -> None:
    """Raises ValueError for a key that a mapping has twice: PyYAML would take the last."""
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in parts if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise ValueError(
                    f"{file}, line {node.start_mark.line + 1}: {key!r} is there {count} times; say "
                    "it once"
                )
        parts = [part for _, part in parts]
    for part in parts:
        _each_key_once(part, file)


def _value(word: str, wanted: tuple[type, ...]):
    """A word of `--set`. Text stays as it is: a mask such as 0110 is a name, not a number."""
    if str in wanted and not (NoneType in wanted and word == "null"):
        return word
    return yaml.safe_load(word)


def _points(points, case: type[Case]) -> list[dict]:
    mappings = isinstance(points, list) and all(isinstance(point, dict) for point in points)
    if not mappings or not points:
        raise ValueError(f"points must be a list of mappings of axes to values, and is {points!r}")
    for point in points:
        _known_keys(point, axes.of(case), "points")
    return points


def _unlabelled(settings: dict, case: type[Case]) -> dict:
    """The labels that describe what `--set` replaces, at their defaults."""
    labels = {name: f.metadata.get("labels", ()) for name, f in axes.of(case).items()}
    usual = axes.defaults(case)
    return {name: usual[name] for name, sizes in labels.items() if settings.keys() & set(sizes)}


def _known_keys(mapping: dict, known, where: str) -> None:
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} must be a mapping of axes to values, and is {mapping!r}")
    for key in mapping:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")
