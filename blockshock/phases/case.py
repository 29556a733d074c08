"""What the cases of every family have: fields that say themselves what they are, names, checks.

A field is said once, where its class declares it: the annotation gives its type, and `about` what
it means, what it may be, and what a sweep means where it says nothing. Checks, sweeps (`axes`) and
SCHEMA's tables (`schema`) read it there.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields
from types import NoneType
from typing import ClassVar, get_args

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def about(text: str, default=MISSING, *, kw_only: bool = False, **more):
    """A field of a case, and its meaning.

    Keywords of `more`, where they apply:
        least: of a whole number; 1 if left out.
        names: the texts that it may be.
        axis: what a sweep means where it does not say it, if that is not [default].
        only: the phases that have it.
        per_method: each method takes values of its own; a sweep may say them method by method.
        labels: sizes that this text describes; where `--set` replaces one, the text is dropped.
        shown: in a case's name, when it is not the default.
    """
    return field(default=default, kw_only=kw_only, metadata={"about": text, **more})


@dataclass(frozen=True)
class Case:
    """One point of the experiment. Everything it does is seeded by it.

    A family's class adds its fields, `methods`, `label` (the method, and what tells it from its
    neighbours), `point_label` (what they share), `point` (the same as a case, equal for all of
    them), `problem_seed`, and `unsupported(device type)`: why it cannot run, or None.
    """

    methods: ClassVar[dict]
    prefix: ClassVar[str]  # of the id

    phase: str = about("what is asked of the method")
    method: str = about("the method's name", axis=["all"])
    family: str = about("what is computed", "", kw_only=True)
    dtype: str = about("of the data", "bf16", kw_only=True, names=tuple(DTYPES))
    seed: int = about("of everything random", 0, kw_only=True, least=0, shown=True)
    ranks: int = about("of the run", 2, kw_only=True)

    def __post_init__(self):
        for declared in fields(self):
            value = getattr(self, declared.name)
            if value is not None or NoneType not in types(declared):
                _check(declared, value)
        known("family", self.family, (type(self).family,))
        known("method", self.method, self.methods)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """METHOD-N4096-B64-bf16, or whatever the family shows: unique within a phase."""
        return f"{self.label}-{self.point_label}"

    @property
    def group(self) -> str:
        """The phase, as the id begins with it."""
        return f"{self.prefix}{self.phase}"

    @property
    def id(self) -> str:
        """forward/METHOD-N4096-B64-bf16: the same in every run; `tools.compare` matches it."""
        return f"{self.group}/{self.name}"

    def as_dict(self) -> dict:
        return asdict(self)

    def _shown(self) -> list[str]:
        """NAME=VALUE of each field that a name shows and that is not its default."""
        shown = [f for f in fields(self) if f.metadata.get("shown")]
        shown.sort(key=lambda f: f.name == "seed")  # the seed last
        valued = [(f.name, getattr(self, f.name), f.default) for f in shown]
        return [f"{n}={str(v).replace('/', '~')}" for n, v, default in valued if v != default]

    def _fill(self, **values) -> None:
        """Sets the fields that are None."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


def types(declared) -> tuple[type, ...]:
    """The types that a field's value may have."""
    return get_args(declared.type) or (declared.type,)


def known(what: str, value, valid) -> None:
    """Raises ValueError, with what is valid, for a name that is not."""
    if value not in tuple(valid):
        names = ", ".join(str(name) for name in valid if name is not None)
        raise ValueError(f"unknown {what} {value!r}; use one of {names}")


def _check(declared, value) -> None:
    wanted, told = types(declared), f"{declared.name} = {value!r} must be"
    if bool in wanted:
        if not isinstance(value, bool):
            raise ValueError(f"{told} true or false")
    elif int in wanted:
        least = declared.metadata.get("least", 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{told} a whole number, {least} or more")
    elif float in wanted:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{told} a number")
    elif not isinstance(value, str):
        raise ValueError(f"{told} text; put it in quotes")
    if "names" in declared.metadata:
        known(declared.name, value, declared.metadata["names"])
