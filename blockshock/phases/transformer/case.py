"""A case of tensor parallelism: a decoder under a sync plan, or one hybrid block."""

import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from blockshock import attention
from blockshock.attention.patterns import Pattern
from blockshock.distributed import reduce
from blockshock.phases.attention.case import parse_pattern
from blockshock.phases.case import Case, about
from blockshock.phases.transformer import plans
from blockshock.transformer import DecoderConfig
from blockshock.transformer.config import usual_attention

USUAL_SUM = "collective"
USUAL_PATTERN = "band(1024)"
SIZES = ("width", "depth", "heads", "vocabulary")


@dataclass(frozen=True)
class TransformerCase(Case):
    """One measurement: a method in a phase, with the model, the batch, dtype and options.

    bf16 is autocast over float32 parameters in `sync`, and the parameters themselves are bf16
    elsewhere; fp32 is float32 throughout.
    """

    methods: ClassVar = dict.fromkeys((*plans.PLANS, *plans.BLOCKS))
    prefix: ClassVar = "transformer_"

    width: int = about("of the residual stream")
    batch: int = about("sequences; every rank has them all")
    T: int = about("tokens of a sequence; in `decode` those of the cache, the new one included")
    depth: int = about("blocks of the decoder", 1)
    heads: int | None = about("of attention; width / 64, at least 1, if left out", None)
    vocabulary: int = about("rows of the embedding", 50304, only=plans.DECODER)
    attention: str | None = about(
        "the decoder's attention; the decoder's usual one on the device if left out",
        None,
        names=attention.METHODS,
        only=plans.DECODER,
    )
    pattern: str | None = about(
        f"which pairs of `sparse_attention` attend; `{USUAL_PATTERN}` if left out",
        None,
        only=plans.HYBRID,
        per_method=True,
    )
    causal: bool = about(
        "query i sees keys up to i, beside what the pattern says",
        True,
        shown=True,
        only=plans.HYBRID,
    )
    reduce: str = about(
        "what sums the partials over the ranks",
        USUAL_SUM,
        names=reduce.SUMS,
        per_method=True,
    )
    model: str | None = about("a label for plots, no part of the id", None, labels=SIZES)
    vocabulary_parallel: bool = about(
        "whether each rank holds a part of the embedding and of the head",
        False,
        shown=True,
        only=plans.DECODER,
    )
    compiled: bool = about("whether sublayers are compiled", False, shown=True)
    checkpointed: bool = about(
        "whether blocks are computed again in the backward", False, shown=True, only=("sync",)
    )
    family: str = about("what is computed", "transformer", kw_only=True)
    ranks: int = about("how many share the model", 2, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        self._fill(heads=max(1, self.width // 64))
        valid = plans.OF_PHASE.get(self.phase, self.methods)
        if self.method not in valid:
            raise ValueError(
                f"{self.phase} does not measure {self.method}; use one of {', '.join(valid)}"
            )
        if self.method == "sparse_attention":
            self._fill(pattern=USUAL_PATTERN)
            parse_pattern(self.pattern, self.T)  # raises
            object.__setattr__(self, "pattern", self.pattern.replace(" ", ""))
        elif self.pattern is not None:
            raise ValueError(f"pattern = {self.pattern!r}: {self.method} takes none")
        _ = self.config  # raises

    @cached_property
    def config(self) -> DecoderConfig:
        """The decoder's; a hybrid block has its sizes."""
        sizes = {name: getattr(self, name) for name in SIZES}
        return DecoderConfig(context=self.T, attention=self.attention, **sizes)

    @property
    def mask(self) -> Pattern | None:
        """The pattern itself, the same object for every case that names it."""
        return None if self.pattern is None else parse_pattern(self.pattern, self.T)

    @property
    def plan(self) -> str:
        """The name of the decoder's plan in `transformer.sync`."""
        return plans.name(self.method, self.depth)

    @property
    def label(self) -> str:
        """The method, with its pattern, and the sum over ranks that is not the usual one."""
        shown = self.reduce if self.reduce != USUAL_SUM else None
        return "-".join(part for part in (self.method, self.pattern, shown) if part)

    @property
    def point_label(self) -> str:
        """Sizes, dtype and whatever is not the default: 768x12-B16-T1024-bf16-compiled=True."""
        heads = f"H{self.heads}" if self.heads != max(1, self.width // 64) else None
        vocabulary = f"V{self.vocabulary}" if self.vocabulary != 50304 else None
        parts = [f"{self.width}x{self.depth}", heads, vocabulary, f"B{self.batch}", f"T{self.T}"]
        parts += [self.dtype, self.attention]
        return "-".join(part for part in (*parts, *self._shown()) if part)

    @property
    def point(self) -> "TransformerCase":
        """What the methods measured side by side have in common, as a case of the first one."""
        first = plans.OF_PHASE[self.phase][0]
        return replace(self, method=first, reduce=USUAL_SUM, pattern=None)

    @property
    def problem_seed(self) -> int:
        """Seed of weights and data: the same for every method, phase and number of ranks."""
        text = f"{self.seed} {self.width} {self.depth} {self.heads} {self.vocabulary}"
        return zlib.crc32(text.encode())

    def unsupported(self, device_type: str) -> str | None:
        """Why the case cannot run, or None: what is needed and what was found."""
        if self.dtype == "fp16":
            return "fp16 needs a scale for its loss, which is not measured; use bf16 or fp32"
        sizes = {"heads": self.heads, "hidden": self.config.hidden}
        if self.vocabulary_parallel:
            sizes["vocabulary"] = self.vocabulary
        for what, size in sizes.items():
            if size % self.ranks:
                return f"{what} = {size} is no multiple of {self.ranks} ranks; choose another"
        if self.method in plans.PLANS:
            reason = plans.unsupported(self.method, self.depth)
        else:
            size = self.batch, self.heads, self.T, self.config.head_width
            reason = attention.unsupported(
                usual_attention(device_type, self.mask),
                *(size, size, self.torch_dtype, device_type, self.causal, self.mask),
                backward=True,
            )
        return reason or reduce.unsupported(self.reduce, self.torch_dtype, device_type)
