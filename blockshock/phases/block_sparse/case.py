"""A case of block-sparse layers: a layer [N, K], or a vision transformer whose MLPs are [N, K]."""

import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from blockshock import attention
from blockshock.block_sparse import METHODS, tiles
from blockshock.block_sparse.convert import STORAGES
from blockshock.phases.case import Case, about
from blockshock.transformer.vision import VisionConfig

LAYER = ("forward", "backward", "planning")
MODEL = ("model", "supermask")
PLANNED = "bsr"  # the method whose lists are planned
# By phase, what is measured side by side. `plan` makes the lists of a mask, `supermask` trains
# under one, and the others are methods of the family.
OF_PHASE = {
    "forward": tuple(METHODS),
    "backward": tuple(name for name, cls in METHODS.items() if "plain" in cls.policies),
    "planning": ("plan", PLANNED),
    "model": ("dense", *STORAGES),
    "supermask": ("dense", "supermask"),
}
SIZES = ("N", "K", "depth", "heads", "patch", "image")
CLASSES, CHANNELS = 1000, 3  # of a vision transformer: ImageNet's
PATCH, IMAGE = 16, 224


@dataclass(frozen=True)
class BlockSparseCase(Case):
    """One measurement: a method in a phase, with sizes, tiles, sparsity and dtype.

    bf16 is autocast over float32 parameters in `supermask`, and the parameters themselves are bf16
    elsewhere; fp32 is float32 throughout.
    """

    methods: ClassVar = METHODS | dict.fromkeys(
        name for names in OF_PHASE.values() for name in names if name not in METHODS
    )
    prefix: ClassVar = "block_sparse_"

    N: int = about("rows of the weight; of a model, the width inside its MLPs")
    K: int = about("columns of the weight; of a model, its width")
    B: int = about("rows of the input; of a model, images")
    block: int = about("rows and columns of a tile")
    sparsity: float = about("the share of the tiles that is dropped")
    activation: str | None = about(
        "what follows the product; null: nothing",
        None,
        names=("relu", "gelu"),
        shown=True,
        only=LAYER[:2],
    )
    bias: bool = about("whether there is a bias", True, shown=True, only=LAYER[:2])
    depth: int = about("blocks of the model", 1, only=MODEL)
    heads: int | None = about("of attention; K / 64, at least 1, if left out", None, only=MODEL)
    patch: int = about("pixels of a patch's side", PATCH, shown=True, only=MODEL)
    image: int = about("pixels of an image's side", IMAGE, shown=True, only=MODEL)
    attention: str | None = about(
        "the model's attention; its usual one on the device if left out",
        None,
        names=attention.METHODS,
        shown=True,
        only=MODEL,
    )
    compiled: bool = about("whether the model's blocks are compiled", False, shown=True, only=MODEL)
    shape: str | None = about("a label for plots, no part of the id", None, labels=SIZES)
    family: str = about("what is computed", "block_sparse", kw_only=True)
    ranks: int = about("of the run; only 1 can measure it", 1, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        valid = OF_PHASE.get(self.phase, self.methods)
        if self.method not in valid:
            raise ValueError(
                f"{self.phase} does not measure {self.method}; use one of {', '.join(valid)}"
            )
        if self.phase in MODEL:
            self._fill(heads=max(1, self.K // 64))
            _ = self.config  # raises
        tiles.check(self.block, self.sparsity, (self.N, self.K))

    @cached_property
    def config(self) -> VisionConfig:
        """The sizes of the model."""
        return VisionConfig(
            image=self.image,
            patch=self.patch,
            classes=CLASSES,
            width=self.K,
            depth=self.depth,
            heads=self.heads,
            hidden=self.N,
            channels=CHANNELS,
            attention=self.attention,
        )

    @property
    def cls(self):
        """The class of its layers."""
        return self.methods[self.method]

    @property
    def label(self) -> str:
        """The method: nothing else tells it from its neighbours at the same point."""
        return self.method

    @property
    def point_label(self) -> str:
        """N8192-K8192-B4096-b64-s0.9-bf16 of a layer, 768x12-N3072-B128-b64-s0.9-bf16 of a
        model, with whatever is not the default."""
        if self.phase in MODEL:
            heads = f"H{self.heads}" if self.heads != max(1, self.K // 64) else None
            sizes = [f"{self.K}x{self.depth}", f"N{self.N}", heads]
        else:
            sizes = [f"N{self.N}", f"K{self.K}"]
        parts = [*sizes, f"B{self.B}", f"b{self.block}", f"s{self.sparsity:g}", self.dtype]
        return "-".join(part for part in (*parts, *self._shown()) if part)

    @property
    def point(self) -> "BlockSparseCase":
        """What the methods measured side by side have in common, as a case of the first one."""
        return replace(self, method=OF_PHASE[self.phase][0])

    @property
    def problem_seed(self) -> int:
        """Seed of weights and data: the same for every method, phase, tile and sparsity."""
        return zlib.crc32(f"block_sparse {self.seed} {self.N} {self.K} {self.B}".encode())

    def unsupported(self, device_type: str) -> str | None:
        """Why the case cannot run, or None: what is needed and what was found."""
        if self.ranks != 1:
            return f"block_sparse is measured on one rank, and {self.ranks} run; use --ranks 1"
        if self.phase in MODEL and (reason := self._model_unsupported(device_type)):
            return reason
        if self.phase == "supermask":
            return None  # any tile that `tiles.check` lets through
        cls = self.cls or METHODS[PLANNED]
        shapes = [(self.N, self.K), (self.K, self.N)] if self.phase == "model" else []
        for shape in shapes or [(self.N, self.K)]:
            reason = cls.unsupported(
                *shape,
                dtype=self.torch_dtype,
                device_type=device_type,
                block=self.block,
                sparsity=self.sparsity,
                activation=self.activation,
            )
            if reason:
                return reason
        return None

    def _model_unsupported(self, device_type: str) -> str | None:
        if self.phase == "supermask" and self.dtype == "fp16":
            return "fp16 needs a scale for its loss, which is not measured; use bf16 or fp32"
        size = self.B, self.heads, self.config.tokens, self.K // self.heads
        return attention.unsupported(
            self.config.attention_on(device_type),
            *(size, size, self.torch_dtype, device_type),
            backward=self.phase == "supermask",
        )
