"""Settings as frozen dataclasses, read from YAML, checked by one rule each.

    config = load(Config, FOLDER, "small", ["train.lr=3e-4", "run=runs/first"])

A file gives what differs from the defaults of the fields. A key is `section.name`, or a name that
stands in no section. What `least` and `choice` say of a field is checked when it is read.
"""

import contextlib
import dataclasses
import difflib
import types
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

SEEDS = 2**63  # torch's seeds are 64 bits, and each rank adds its number
T = TypeVar("T")


class Refused(ValueError):
    """Something that the user can mend; the command prints its text and no traceback."""


def least(default, low, below=None):
    """A field with a default whose value is at least `low` (and below `below`)."""
    return field(default=default, metadata={"least": low, "below": below})


def choice(default, *valid):
    """A field with a default that takes these values."""
    return field(default=default, metadata={"valid": valid})


def load(cls: type[T], configs: Path, name: str, settings: list[str] = ()) -> T:
    """The config of a file, with `key=value` settings applied.

    cls: its dataclass. name: a path, or the name of a file in the folder `configs`.

    Raises:
        Refused: no such file, an unknown key, a value of the wrong type or out of its range.
    """
    given = _read(configs, name)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise Refused(f"--set {setting}: a setting is key=value, as in --set train.lr=3e-4")
        *section, key = key.strip().split(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise Refused(f"--set {setting}: {text!r} is no YAML value; quote it") from error
        place = given
        for part in section:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise Refused(f"--set {setting}: {part} is no section")
        place[key] = value
    return from_dict(cls, given)


def from_dict(cls: type[T], given: dict[str, Any]) -> T:
    """The config of nested dicts, as `to_dict` gives them. Raises Refused as `load` does."""
    return _section(cls, given, "")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts of plain values: what YAML and checkpoints hold."""
    return dataclasses.asdict(config)


def dump(config: Any) -> str:
    """All settings as YAML, defaults included; `load` reads them again."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (was, is)} of what differs in two configs, as `to_dict` gives them."""
    one, other = _flat(before), _flat(after)
    return {key: (one.get(key), value) for key, value in other.items() if one.get(key) != value}


def _flat(config: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Settings by key, such as train.lr."""
    found = {}
    for key, value in config.items():
        of_section = isinstance(value, dict)
        found |= _flat(value, f"{place}{key}.") if of_section else {f"{place}{key}": value}
    return found


def _read(configs: Path, name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = configs / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in configs.glob("*.yaml")))
        raise Refused(f"--config {name}: no such file; give a .yaml file, or one of {names}")
    try:
        given = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"--config {name}: not YAML: {error}") from error
    if not isinstance(given, dict):
        raise Refused(f"--config {name}: a config is a mapping of keys, not {given!r}")
    return given


def _section(cls, given: Any, place: str):
    if not isinstance(given, dict):
        raise Refused(f"{place.rstrip('.')} = {given!r}: it is a section; give {place}KEY = value")
    known = {each.name: each for each in fields(cls)}
    hints = get_type_hints(cls)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            fix = f"did you mean {place}{near[0]}?" if near else f"use one of {', '.join(known)}"
            raise Refused(f"unknown key {place}{key}; {fix}")
    values = {}
    for key, value in given.items():
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _section(hints[key], value, f"{place}{key}.")
        else:
            values[key] = _value(value, hints[key], known[key].metadata, place + key)
    return cls(**values)


def _value(value: Any, hint: Any, rule: Any, key: str) -> Any:
    optional = isinstance(hint, types.UnionType)
    if optional and value is None:
        return None
    kind = get_args(hint)[0] if optional else hint
    if kind is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            value = float(value)  # YAML reads 3e-4, which has no dot, as a string
    if type(value) is not kind:
        also = " or null" if optional else ""
        fix = (
            f"""; quote it: {key}='"{value}"'"""
            if kind is str and type(value) in (int, float)
            else ""
        )
        raise Refused(
            f"{key} = {value!r}: it takes {kind.__name__}{also}, not {_named(value)}{fix}"
        )
    if "valid" in rule and value not in rule["valid"]:
        raise Refused(f"{key} = {value!r}: use one of {', '.join(rule['valid'])}")
    low, below = rule.get("least"), rule.get("below")
    if low is not None and not low <= value < float("inf"):
        raise Refused(f"{key} = {value}: it must be at least {low}")
    if below is not None and value >= below:
        raise Refused(f"{key} = {value}: it must be below {below:g}")
    return value


def _named(value: Any) -> str:
    return "null" if value is None else type(value).__name__
