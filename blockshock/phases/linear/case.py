"""A case of a linear layer: one point of the experiment."""

import zlib
from dataclasses import dataclass, replace
from typing import ClassVar

from blockshock import masks, workloads
from blockshock.linear import METHODS
from blockshock.phases.case import Case, about, known

OPTIMIZERS = ("sgd", "momentum", "adam")
WHOLE_ENTRIES = 2**30  # of a weight; what compares whole weights in float32 needs several of them
# Where a method's class lists what it takes.
CHOICES = {"mask": "masks", "kernel": "kernels", "reduce": "reduces", "policy": "policies"}
CHOSEN = ("mask", "kernel", "reduce")  # None becomes the method's usual one


def _names(attribute: str) -> str:
    """What the methods have under that name, in words."""
    found = dict.fromkeys(name for cls in METHODS.values() for name in getattr(cls, attribute, ()))
    return ", ".join(f"`{name}`" for name in found)


@dataclass(frozen=True)
class LinearCase(Case):
    """One measurement: a method in a phase, with sizes, dtype and options."""

    methods: ClassVar = METHODS
    prefix: ClassVar = ""

    N: int = about("rows of the weight")
    B: int = about("rows of the input (tokens)")
    K: int | None = about("columns of the weight; N if left out", None)
    mask: str | None = about(
        "pattern of term 0; the method's usual one if left out, null where it has none",
        None,
        names=masks.PATTERNS,
        axis=["usual"],
        per_method=True,
    )
    kernel: str | None = about(
        f"what multiplies: {_names('kernels')} (auto: the method chooses, `paths` says what); null "
        "where it has no choice",
        None,
        axis=["usual"],
        per_method=True,
    )
    reduce: str | None = about(
        f"what sums partial products over the ranks: {_names('reduces')} (collective: NCCL, gloo; "
        "auto: the method chooses); null where nothing is chosen",
        None,
        axis=["usual"],
        per_method=True,
    )
    policy: str | None = about(
        f"how the weight is kept while it is trained: {_names('policies')} (the bias alone is "
        "trained when frozen)",
        None,
        axis=["all"],
        only=("training",),
        per_method=True,
    )
    optimizer: str | None = about(
        "what updates the weight", None, names=OPTIMIZERS, axis=["sgd"], only=("training",)
    )
    input: str = about(
        'kind of input, with options as in "mlp:activation=silu+layer_norm=true", or '
        '"file:PATH[:TENSOR]"',
        "gaussian",
        shown=True,
    )
    loss: str = about(
        "the loss", "mse_target", names=workloads.LOSSES, only=("training",), shown=True
    )
    target: str = about(
        "what the loss compares with",
        "normal",
        names=workloads.TARGETS,
        only=("training",),
        shown=True,
    )
    weight: str | None = about(
        'the weight\'s file, "PATH[:TENSOR]"; null: seeded and normal', None, shown=True
    )
    bias: bool = about("whether there is a bias", True, shown=True)
    steps: int | None = about("how often the output is fed back", None, axis=[8], only=("drift",))
    family: str = about("what is computed", "linear", kw_only=True)
    ranks: int = about("how many share the layer", 2, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        known("policy", self.policy, (None, *self.cls.policies))
        known("input", self.input.partition(":")[0], workloads.INPUTS)
        self._fill(K=self.N, kernel=usual(self.cls, "kernel"), reduce=usual(self.cls, "reduce"))
        for name in CHOSEN:
            value, taken = getattr(self, name), choices(self.cls, name)
            if value is not None and value not in taken:
                names = ", ".join(taken) or "none"
                raise ValueError(f"{self.method} does not take {name} {value!r}; it takes {names}")

    @property
    def cls(self):
        return self.methods[self.method]

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
        return "-".join([*parts, *self._shown()])

    @property
    def point(self) -> "LinearCase":
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
        chosen = {name: getattr(self, name) for name in CHOSEN}
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


def choices(cls, name: str) -> tuple[str, ...]:
    """What a method's class takes as its "mask", "kernel", "reduce" or "policy", if anything."""
    return tuple(getattr(cls, CHOICES[name], ()))


def usual(cls, name: str) -> str | None:
    """The one of `choices` that is meant where none is named, or None."""
    return next(iter(choices(cls, name)), None)
