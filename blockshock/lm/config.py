"""The settings of a run: four frozen dataclasses, read from YAML, checked by one rule each.

    config = load("small", ["train.lr=3e-4", "run=runs/first"])

A file is a path, or the name of one in `blockshock/lm/configs`. It gives what differs from the
defaults below. A key is `section.name`, or `run` or `device`, which stand in no section.
"""

import contextlib
import dataclasses
import difflib
import types
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

CONFIGS = Path(__file__).with_name("configs")
SEEDS = 2**63  # torch's seeds are 64 bits, and each rank adds its number


class Refused(ValueError):
    """Something that the user can mend; the command prints its text and no traceback."""


def least(default, low, below=None):
    """A field with a default whose value is at least `low` (and below `below`)."""
    return field(default=default, metadata={"least": low, "below": below})


def choice(default, *valid):
    """A field with a default that takes these values."""
    return field(default=default, metadata={"valid": valid})


@dataclass(frozen=True)
class Data:
    """Text and its tokens. Source: `python`, `tinystories`, `openwebtext`, or a path."""

    source: str = "python"
    folder: str = "runs/data"  # the tokenizer and the token files
    vocabulary: int = least(4096, 257)
    validation: float = least(
        0.02, 0.0, 1.0
    )  # the share of the text; 0 only where there is a split
    max_bytes: int = least(0, 0)  # of text; 0: all of it


@dataclass(frozen=True)
class Model:
    """The sizes of a `blockshock.transformer.Decoder`; its vocabulary is the tokenizer's."""

    context: int = least(256, 2)
    width: int = least(256, 1)
    depth: int = least(4, 1)
    heads: int = least(4, 1)
    kv_heads: int | None = least(None, 1)
    hidden: int | None = least(None, 1)
    tied: bool = True
    attention: str | None = None  # a method of blockshock.attention; None: the device's usual one
    linear: str | None = None  # a method of blockshock.linear, in the projections
    tensor_parallel: int = least(1, 1)  # ranks that hold one model together
    sync: str | None = None  # their plan (blockshock.transformer.sync); None: tp

    def __post_init__(self):
        if self.sync is not None and self.tensor_parallel == 1:
            raise Refused(
                f"model.sync = {self.sync}: a plan says when tensor-parallel ranks sum, and there "
                "is one; set model.tensor_parallel to 2 or more, or leave model.sync out"
            )


@dataclass(frozen=True)
class Train:
    """The steps. Tokens of a step: context x batch x accumulate x data-parallel ranks."""

    steps: int = least(1000, 1)
    batch: int = least(16, 1)  # sequences of one backward on one rank
    accumulate: int = least(1, 1)  # backwards of a step
    lr: float = least(6e-4, 0.0)
    min_lr: float = least(6e-5, 0.0)
    warmup: int = least(100, 0)  # steps
    weight_decay: float = least(0.1, 0.0)  # of matrices; vectors have none
    beta1: float = least(0.9, 0.0, 1.0)
    beta2: float = least(0.95, 0.0, 1.0)
    clip: float = least(1.0, 0.0)  # the largest norm of the gradient; 0: it is not clipped
    seed: int = least(0, 0, SEEDS)
    autocast: str = choice("none", "none", "bf16")  # the weights stay float32
    compile: bool = False
    checkpoint_blocks: bool = False  # activations are computed again in the backward
    data_parallel: str = "overlapped"  # a method of blockshock.data_parallel; one rank needs none
    bucket_mib: float | None = None  # None: the method's own size
    checkpoint_every: int = least(0, 0)  # steps; 0: only the last
    evaluate_every: int = least(0, 0)  # steps; 0: only the last
    evaluate_batches: int = least(16, 1)  # of each rank

    def __post_init__(self):
        if self.min_lr > self.lr:
            raise Refused(
                f"train.min_lr = {self.min_lr:g} exceeds train.lr = {self.lr:g}; lower it"
            )
        if self.warmup >= self.steps:
            raise Refused(
                f"train.warmup = {self.warmup} leaves no step of train.steps = {self.steps} at the "
                "full rate; lower the warm-up, or raise the steps"
            )


@dataclass(frozen=True)
class Log:
    """What is shown and written. The CSV is always written."""

    every: int = least(10, 1)  # steps from row to row; each row waits for the device
    tensorboard: bool = False
    wandb: str = choice("off", "off", "offline", "online")
    peak_tflops: float = least(0.0, 0.0)  # for MFU; 0: the data sheet's, where the GPU is known


@dataclass(frozen=True)
class Sample:
    """The text that `sample` writes."""

    prompt: str = "def "
    tokens: int = least(200, 1)  # at most: the model's context ends it
    temperature: float = least(0.8, 0.0)  # 0: the likeliest token each time
    top_k: int = least(50, 0)  # 0: all tokens
    seed: int = least(0, 0, SEEDS)


@dataclass(frozen=True)
class Config:
    """All settings of a run. run: the folder of its config, log, checkpoint and results."""

    run: str = "runs/lm"
    device: str = choice("auto", "auto", "cpu", "cuda")  # auto: a GPU where torch sees one
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    log: Log = field(default_factory=Log)
    sample: Sample = field(default_factory=Sample)


def load(name: str, settings: list[str] = ()) -> Config:
    """The config of a file (a path, or a name in `configs`), with `key=value` settings applied.

    Raises:
        Refused: no such file, an unknown key, a value of the wrong type or out of its range.
    """
    given = _read(name)
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
    return from_dict(given)


def from_dict(given: dict[str, Any]) -> Config:
    """The config of nested dicts, as `to_dict` gives them. Raises Refused as `load` does."""
    return _section(Config, given, "")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts of plain values: what YAML and checkpoints hold."""
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """All settings as YAML, defaults included; `load` reads them again."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
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
