"""A case of data parallelism: a decoder that all ranks train, each on its own sequences."""

import inspect
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch

from blockshock import attention
from blockshock.data_parallel import METHODS
from blockshock.phases.case import Case, about
from blockshock.transformer import DecoderConfig

OPTIONS = ("bucket_mib", "compute_dtype")  # of a method's class, where it takes them
USUAL_MIB = 25
BYTES = 256  # tokens are bytes of text
SIZES = ("width", "depth", "heads", "vocabulary")


@dataclass(frozen=True)
class DataParallelCase(Case):
    """One measurement: a method in a phase, with the model, the batch, dtype and options.

    bf16 is autocast over float32 parameters; fp32 is float32 throughout.
    """

    methods: ClassVar = METHODS
    prefix: ClassVar = "data_parallel_"

    width: int = about("of the decoder's residual stream")
    depth: int = about("blocks of the decoder")
    batch: int = about("sequences of a rank")
    T: int = about("tokens of a sequence, and the decoder's context")
    heads: int | None = about("of attention; width / 64, at least 1, if left out", None)
    vocabulary: int = about("rows of the embedding; tokens are bytes of text", 50304, least=BYTES)
    attention: str | None = about(
        "the decoder's attention; the decoder's usual one on the device if left out",
        None,
        names=attention.METHODS,
    )
    model: str | None = about("a label for plots, no part of the id", None, labels=SIZES)
    bucket_mib: int | None = about(
        f"size of a bucket of gradients in MiB, where the method has them; {USUAL_MIB} if left out",
        None,
        per_method=True,
    )
    compute_dtype: str | None = about(
        "what gathered parameters are cast to, where the method does so; null: nothing",
        None,
        names=("bf16",),
        per_method=True,
    )
    compiled: bool = about("whether the decoder is compiled", False, shown=True)
    checkpointed: bool = about(
        "whether blocks are computed again in the backward", False, shown=True
    )
    text: str = about(
        "`python` (sources of Python's standard library) or the path of a text file",
        "python",
        shown=True,
    )
    steps: int | None = about(
        "steps from the first weights, whose losses are kept", None, axis=[20], only=("lm",)
    )
    family: str = about("what is computed", "data_parallel", kw_only=True)
    ranks: int = about("how many train together", 2, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        self._fill(heads=max(1, self.width // 64))
        if self.phase == "lm":
            self._fill(steps=20)
        for name in OPTIONS:
            if getattr(self, name) is not None and name not in taken(self.method):
                raise ValueError(f"{self.method} does not take {name}; leave it out")
        if "bucket_mib" in taken(self.method):
            self._fill(bucket_mib=USUAL_MIB)
        _ = self.config  # raises

    @property
    def cls(self):
        return self.methods[self.method]

    @cached_property
    def config(self) -> DecoderConfig:
        """The decoder's."""
        sizes = {name: getattr(self, name) for name in ("vocabulary", "width", "depth", "heads")}
        return DecoderConfig(context=self.T, attention=self.attention, **sizes)

    @property
    def label(self) -> str:
        """The method, with the options that are not its usual ones."""
        parts = [self.method]
        if self.bucket_mib not in (None, USUAL_MIB):
            parts.append(f"{self.bucket_mib}MiB")
        if self.compute_dtype:
            parts.append(f"compute={self.compute_dtype}")
        return "-".join(parts)

    @property
    def point_label(self) -> str:
        """Sizes, dtype and whatever is not the default: 768x12-B16-T1024-bf16-compiled=True."""
        heads = f"H{self.heads}" if self.heads != max(1, self.width // 64) else None
        vocabulary = f"V{self.vocabulary}" if self.vocabulary != 50304 else None
        parts = [f"{self.width}x{self.depth}", heads, vocabulary, f"B{self.batch}", f"T{self.T}"]
        parts += [self.dtype, self.attention, f"steps{self.steps}" if self.steps else None]
        return "-".join(part for part in (*parts, *self._shown()) if part)

    @property
    def point(self) -> "DataParallelCase":
        """What the methods measured side by side have in common, as a case of none."""
        return replace(self, method="none", bucket_mib=None, compute_dtype=None)

    @property
    def problem_seed(self) -> int:
        """Seed of the first weights: the same for every method, phase and number of ranks."""
        text = f"{self.seed} {self.width} {self.depth} {self.heads} {self.vocabulary}"
        return zlib.crc32(text.encode())

    def options(self) -> dict:
        """Keyword arguments for the method's class."""
        chosen = {name: getattr(self, name) for name in OPTIONS}
        if chosen["compute_dtype"]:
            chosen["compute_dtype"] = torch.bfloat16
        return {name: value for name, value in chosen.items() if value is not None}

    def unsupported(self, device_type: str) -> str | None:
        """Why the case cannot run, or None: what is needed and what was found."""
        if self.dtype == "fp16":
            return "fp16 needs a scale for its loss, which is not measured; use bf16 or fp32"
        D, dtype = self.config.head_width, self.torch_dtype
        reason = attention.unsupported(
            self.config.attention_on(device_type),
            *((self.batch, self.heads, self.T, D),) * 2,
            *(dtype, device_type, True),
            backward=True,
        )
        return reason or self.cls.unsupported(
            device_type=device_type, ranks=self.ranks, **self.options()
        )


def taken(method: str) -> list[str]:
    """The options of a case that a method's class takes."""
    parameters = inspect.signature(METHODS[method]).parameters
    return [name for name in OPTIONS if name in parameters]
