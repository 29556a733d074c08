"""A case of attention: one point of the experiment."""

import ast
import itertools
import zlib
from dataclasses import dataclass, replace
from typing import ClassVar

from blockshock import attention
from blockshock.attention import METHODS, patterns
from blockshock.phases.case import Case, about

NAMED = "full causal band causal_band strided global_band random_blocks documents"
BUILDERS = {name: getattr(patterns, name) for name in NAMED.split()}  # what a pattern may name
SIZES = ("batch", "heads", "kv_heads", "Tq", "Tk", "D")
WHOLE_SCORES = 2**31  # entries; `reference` holds several tensors of so many


@dataclass(frozen=True)
class AttentionCase(Case):
    """One measurement: a method of attention in a phase, with sizes, dtype and mask.

    q [batch, heads, Tq, D], k and v [batch, kv_heads, Tk, D].
    """

    methods: ClassVar = METHODS
    prefix: ClassVar = "attention_"

    batch: int = about("sequences")
    heads: int = about("heads of q")
    Tq: int = about("queries of a sequence")
    D: int = about("entries of a head")
    Tk: int | None = about("keys of a sequence; Tq if left out", None)
    kv_heads: int | None = about("heads of k and v; heads if left out", None)
    causal: bool = about("query i sees keys up to i, beside what the pattern says", False)
    pattern: str | None = about(
        f"which pairs attend, such as `band(256)`; builders: {', '.join(BUILDERS)}", None
    )
    tier: str | None = about("a label for plots, no part of the id", None, labels=SIZES)
    family: str = about("what is computed", "attention", kw_only=True)
    ranks: int = about("of the run; only 1 can measure it", 1, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        self._fill(Tk=self.Tq, kv_heads=self.heads)
        if self.pattern is not None:
            parse_pattern(self.pattern, self.Tq)
            object.__setattr__(self, "pattern", self.pattern.replace(" ", ""))

    @property
    def function(self):
        return self.methods[self.method]

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
