"""A case of attention: one point of the experiment. Everything it does is seeded by it."""

import ast
import itertools
import zlib
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch

from blockshock import attention
from blockshock.attention import METHODS, patterns
from blockshock.phases.linear.case import DTYPES

PHASES = ("forward", "forward_backward")
BUILDERS = {  # what a pattern's text may name
    build.__name__: build
    for build in (
        patterns.full,
        patterns.causal,
        patterns.band,
        patterns.causal_band,
        patterns.strided,
        patterns.global_band,
        patterns.random_blocks,
        patterns.documents,
    )
}
SIZES = ("batch", "heads", "kv_heads", "Tq", "Tk", "D")
WHOLE_SCORES = 2**31  # entries; `reference` holds several tensors of so many


@dataclass(frozen=True)
class AttentionCase:
    """One measurement: a method of attention in a phase, with sizes, dtype and mask.

    q [batch, heads, Tq, D], k and v [batch, kv_heads, Tk, D]; Tk is Tq and kv_heads is heads where
    None. causal: ANDed with the pattern. pattern: None, or text such as "band(256)"; see
    `parse_pattern`. tier: a label for plots, or None. ranks: of the run; only 1 can measure it.
    """

    parameters: ClassVar = (  # of a bench function, beside `options`
        "method", "batch", "heads", "Tq", "Tk", "D", "dtype", "causal", "pattern",
    )  # fmt: skip

    phase: str
    method: str
    batch: int
    heads: int
    Tq: int
    D: int
    Tk: int | None = None
    kv_heads: int | None = None
    dtype: str = "bf16"
    causal: bool = False
    pattern: str | None = None
    tier: str | None = None
    seed: int = 0
    ranks: int = 1
    family: str = "attention"

    def __post_init__(self):
        for name, valid in (
            ("family", ("attention",)),
            ("phase", PHASES),
            ("method", METHODS),
            ("dtype", DTYPES),
        ):
            if getattr(self, name) not in tuple(valid):
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; use one of {', '.join(valid)}"
                )
        for name, other in (("Tk", "Tq"), ("kv_heads", "heads")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, other))
        for name in (*SIZES, "ranks", "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} = {value!r} must be a whole number, {least} or more")
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal = {self.causal!r} must be true or false")
        for name in ("tier", "pattern"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} = {getattr(self, name)!r} must be text; put it in quotes")
        if self.pattern is not None:
            parse_pattern(self.pattern, self.Tq)
            object.__setattr__(self, "pattern", self.pattern.replace(" ", ""))

    @property
    def function(self):
        """The method."""
        return METHODS[self.method]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch names it."""
        return DTYPES[self.dtype]

    @property
    def mask(self) -> patterns.Pattern | None:
        """The pattern itself, the same object for every case that names it."""
        return None if self.pattern is None else parse_pattern(self.pattern, self.Tq)

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """[batch, heads, Tq, D], also that of out."""
        return self.batch, self.heads, self.Tq, self.D

    @property
    def k_shape(self) -> tuple[int, int, int, int]:
        """[batch, kv_heads, Tk, D], of k and of v."""
        return self.batch, self.kv_heads, self.Tk, self.D

    @property
    def label(self) -> str:
        """The method: nothing else tells it from its neighbours at the same point."""
        return self.method

    @property
    def point_label(self) -> str:
        """Sizes, dtype, mask and whatever is not the default: B4-H16-T4096-D128-bf16-causal."""
        square = self.Tk == self.Tq
        parts = [
            f"B{self.batch}",
            f"H{self.heads}" + (f"over{self.kv_heads}" if self.kv_heads != self.heads else ""),
            f"T{self.Tq}" + ("" if square else f"x{self.Tk}"),
            f"D{self.D}",
            self.dtype,
            *(["causal"] if self.causal else []),
            *([self.pattern] if self.pattern else []),
            *([f"seed={self.seed}"] if self.seed else []),
        ]
        return "-".join(parts)

    @property
    def name(self) -> str:
        """flash_triton-B4-H16-T4096-D128-bf16-causal: unique within a phase."""
        return f"{self.label}-{self.point_label}"

    @property
    def id(self) -> str:
        """attention_forward/flash_triton-B4-…: the same in every run."""
        return f"attention_{self.phase}/{self.name}"

    @property
    def point(self) -> "AttentionCase":
        """What the methods measured side by side have in common, as a case of reference."""
        return replace(self, method="reference")

    @property
    def problem_seed(self) -> int:
        """Seed of q, k, v and the upstream gradient: the same for every method, phase and mask."""
        return zlib.crc32(f"attention {self.seed} {self.q_shape} {self.k_shape}".encode())

    def unsupported(self, device_type: str) -> str | None:
        """Why the case cannot run, or None: what is needed and what was found."""
        if self.ranks != 1:
            return f"attention is measured on one rank, and {self.ranks} run; use --ranks 1"
        scores = self.batch * self.heads * self.Tq * self.Tk
        if self.method == "reference" and scores > WHOLE_SCORES:
            return (
                f"reference holds all {scores} scores at once, and is measured up to 2^31; use "
                "flash_torch"
            )
        return attention.unsupported(
            self.method,
            self.q_shape,
            self.k_shape,
            self.torch_dtype,
            device_type,
            self.causal,
            self.mask,
            backward=self.phase == "forward_backward",
        )

    def as_dict(self) -> dict:
        """For the result file."""
        return asdict(self)


def parse_pattern(text: str, Tq: int) -> patterns.Pattern:
    """ "band(256)" -> the pattern: the name of a builder and numbers, and nothing else.

    The lengths of `documents` are repeated until Tq tokens are reached, the last one cut off:
    documents(1024) lays documents of 1024 tokens end to end.

    Raises:
        ValueError: anything else, an unknown builder, or numbers that it does not take.
    """
    rule = f"pattern {text!r} must be a builder and its numbers, such as band(256); builders: "
    try:
        call = ast.parse(text, mode="eval").body
        name = call.func.id
        numbers = [ast.literal_eval(argument) for argument in call.args]
    except (SyntaxError, AttributeError, TypeError, ValueError):
        raise ValueError(rule + ", ".join(BUILDERS)) from None
    plain = all(type(number) in (int, float) for number in numbers) and not call.keywords
    if name not in BUILDERS or not plain:
        raise ValueError(rule + ", ".join(BUILDERS))
    if name == "documents":
        return patterns.documents(_laid(numbers, Tq))
    try:
        return BUILDERS[name](*numbers)
    except TypeError:
        raise ValueError(f"pattern {text!r}: {name} does not take {len(numbers)} numbers") from None


def _laid(lengths: list, Tq: int) -> list[int]:
    """The lengths over and over, Tq in all."""
    if not lengths or any(not isinstance(length, int) or length < 1 for length in lengths):
        raise ValueError(f"documents{tuple(lengths)}: lengths are whole numbers, 1 or more")
    laid, again = [], itertools.cycle(lengths)
    while (left := Tq - sum(laid)) > 0:
        laid.append(min(next(again), left))
    return laid
