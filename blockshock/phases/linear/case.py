"""A case: one point of the experiment. Everything it does is seeded by it."""

import zlib
from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar

import torch

from blockshock import masks, workloads
from blockshock.linear import METHODS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PHASES = ("correctness", "forward", "backward", "training", "drift")
OPTIMIZERS = ("sgd", "momentum", "adam")
FAMILIES = {"linear": METHODS}
WHOLE_ENTRIES = 2**30  # of a weight; what compares whole weights in float32 needs several of them
TEXTS = ("family", "phase", "method", "dtype", "input", "loss", "target")
NAMES = ("mask", "kernel", "reduce", "policy", "optimizer", "weight")  # None, or text
SHOWN = ("input", "loss", "target", "weight", "bias", "seed")  # in a name, when not the default


@dataclass(frozen=True)
class Case:
    """One measurement: a method of a family in a phase, with sizes, dtype and options.

    N, K, B: rows and columns of the weight, rows of the input. mask, policy, optimizer: None where
    the method or phase has none. kernel, reduce: what multiplies and what sums over ranks, of the
    method's own `kernels` and `reduces`; None becomes its usual one, and stays where it has none.
    loss, target: names in `workloads`. input: a name there, with
    options as in "mlp:activation=silu+layer_norm=true", or "file:PATH[:TENSOR]". weight: None for a
    seeded normal weight, or "PATH[:TENSOR]". steps: of drift. ranks: that share the layer.
    """

    parameters: ClassVar = ("method", "N", "B", "dtype", "mask")  # of a bench function

    phase: str
    method: str
    N: int
    B: int
    K: int | None = None
    dtype: str = "bf16"
    mask: str | None = None
    kernel: str | None = None
    reduce: str | None = None
    policy: str | None = None
    optimizer: str | None = None
    input: str = "gaussian"
    loss: str = "mse_target"
    target: str = "normal"
    weight: str | None = None
    bias: bool = True
    steps: int | None = None
    ranks: int = 2
    seed: int = 0
    family: str = "linear"

    def __post_init__(self):
        self._check_types()
        _known("family", self.family, FAMILIES)
        _known("phase", self.phase, PHASES)
        _known("method", self.method, FAMILIES[self.family])
        _known("dtype", self.dtype, DTYPES)
        _known("mask", self.mask, (None, *masks.PATTERNS))
        _known("policy", self.policy, (None, *self.cls.policies))
        _known("optimizer", self.optimizer, (None, *OPTIMIZERS))
        _known("loss", self.loss, workloads.LOSSES)
        _known("target", self.target, workloads.TARGETS)
        _known("input", self.input.partition(":")[0], workloads.INPUTS)
        if self.K is None:
            object.__setattr__(self, "K", self.N)
        for name in ("kernel", "reduce"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual(self.cls, name))
        for name in ("mask", "kernel", "reduce"):
            value, taken = getattr(self, name), choices(self.cls, name)
            if value is not None and value not in taken:
                known = ", ".join(taken) or "none"
                raise ValueError(f"{self.method} does not take {name} {value!r}; it takes {known}")

    def _check_types(self):
        for name in (*TEXTS, *NAMES):
            value = getattr(self, name)
            if not isinstance(value, str) and (name in TEXTS or value is not None):
                raise ValueError(f"{name} = {value!r} must be text; put it in quotes")
        for name in ("N", "B", "K", "steps", "ranks", "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not whole and not (value is None and name in ("K", "steps")):
                raise ValueError(f"{name} = {value!r} must be a whole number, {least} or more")
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias = {self.bias!r} must be true or false")

    @property
    def cls(self):
        """The method's class."""
        return FAMILIES[self.family][self.method]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch names it."""
        return DTYPES[self.dtype]

    @property
    def label(self) -> str:
        """The method, with what distinguishes it from its neighbours at the same point."""
        parts = [self.method]
        if self.mask not in (None, usual(self.cls, "mask")):
            parts.append(self.mask)
        if self.policy is not None:
            parts.append(self.policy)
        if self.kernel != usual(self.cls, "kernel"):
            parts.append(self.kernel)
        if self.reduce != usual(self.cls, "reduce"):
            parts.append(f"reduce={self.reduce}")
        return "-".join(parts)

    @property
    def point_label(self) -> str:
        """Sizes, dtype and whatever is not the default: N4096-B64-bf16."""
        parts = [
            f"N{self.N}",
            *([f"K{self.K}"] if self.K != self.N else []),
            f"B{self.B}",
            self.dtype,
        ]
        parts += [str(self.optimizer)] if self.optimizer else []
        parts += [f"T{self.steps}"] if self.steps else []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in SHOWN and value != field.default:
                parts.append(f"{field.name}={str(value).replace('/', '~')}")
        return "-".join(parts)

    @property
    def name(self) -> str:
        """block_shock-N4096-B64-bf16: unique within a phase."""
        return f"{self.label}-{self.point_label}"

    @property
    def id(self) -> str:
        """forward/block_shock-N4096-B64-bf16: the same in every run; `tools.compare` matches it."""
        return f"{self.phase}/{self.name}"

    @property
    def point(self) -> "Case":
        """What the methods measured side by side have in common, as a case of dense_single."""
        policy = None if self.policy is None else "frozen"
        return replace(
            self, method="dense_single", mask=None, kernel=None, reduce=None, policy=policy
        )

    @property
    def problem_seed(self) -> int:
        """Seed of weights and inputs: the same for every method, phase and number of ranks."""
        text = f"{self.seed} {self.N} {self.K} {self.B} {self.input} {self.weight}"
        return zlib.crc32(text.encode())

    def options(self) -> dict:
        """Keyword arguments for the method's `from_dense`."""
        own = dict(self.cls.policies[self.policy]) if self.policy else {}
        chosen = {name: getattr(self, name) for name in ("mask", "kernel", "reduce")}
        return own | {name: value for name, value in chosen.items() if value is not None}

    def unsupported(self, device_type: str) -> str | None:
        """Why the case cannot run, or None: what is needed and what was found."""
        if self.phase == "drift" and self.N != self.K:
            return f"drift feeds the output back: it needs N = K, found N = {self.N}, K = {self.K}"
        if self.optimizer == "adam" and self.dtype == "fp16":
            return "adam in fp16 divides by zero: its eps of 1e-8 rounds to 0; use sgd, or bf16"
        if self.policy == "frozen" and not self.bias:
            return "policy frozen trains the bias alone, and bias is false; set bias=true"
        compares = self.phase == "correctness" or (
            self.phase == "training" and self.policy != "frozen"
        )
        if self.N * self.K > WHOLE_ENTRIES and compares:
            return (
                f"{self.phase} is checked against a whole float32 layer, up to 2^30 entries, and "
                f"N = {self.N}, K = {self.K} has more; use N and K up to 32768"
                + (", or policy frozen" if self.phase == "training" else "")
            )
        chosen = {name: getattr(self, name) for name in ("kernel", "reduce")}
        return self.cls.unsupported(
            self.N,
            self.K,
            dtype=self.torch_dtype,
            device_type=device_type,
            ranks=self.ranks,
            mask=self.mask,
            **{name: value for name, value in chosen.items() if choices(self.cls, name)},
        )

    def as_dict(self) -> dict:
        """For the result file."""
        return asdict(self)


def choices(cls, name: str) -> tuple[str, ...]:
    """What a method's class takes as its "mask", "kernel" or "reduce"; () where it has none."""
    return tuple(
        getattr(cls, {"mask": "masks", "kernel": "kernels", "reduce": "reduces"}[name], ())
    )


def usual(cls, name: str) -> str | None:
    """The one of `choices` that is meant where none is named, or None."""
    return next(iter(choices(cls, name)), None)


def _known(what: str, value, valid) -> None:
    if value not in valid:
        names = ", ".join(str(v) for v in valid if v is not None)
        raise ValueError(f"unknown {what} {value!r}; use one of {names}")
