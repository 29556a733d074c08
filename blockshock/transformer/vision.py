"""A vision transformer (Dosovitskiy et al., arXiv:2010.11929), made of layers that methods replace.

    x = [class token, patches] + positions               [B, 1 + P, width],  P = (image / patch)²
    x = x + out(attention(q, k, v))                      q, k, v = qkv(norm(x)), per block
    x = x + down(gelu(up(norm(x))))                      per block
    logits = linear(norm(x)[:, 0])                       [B, classes]

A patch is a convolution of its own size and stride. LayerNorm stands before each part; every
projection has a bias. Initial weights [n, k] are normal with standard deviation √(2 / (n + k))
(Glorot and Bengio), positions with 0.02, both cut at two of these; the head's and all biases are 0,
so that each class is equally probable at first.
"""

from collections import OrderedDict
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from blockshock import attention as family
from blockshock.transformer.config import ATTENTION

POSITIONS_STD = 0.02

SHAPES = {
    "b_16": {"patch": 16, "width": 768, "depth": 12, "heads": 12, "hidden": 3072},
    "l_16": {"patch": 16, "width": 1024, "depth": 24, "heads": 16, "hidden": 4096},
    "h_14": {"patch": 14, "width": 1280, "depth": 32, "heads": 16, "hidden": 5120},
}
"""ViT-B/16, ViT-L/16 and ViT-H/14: `VisionConfig(image=224, classes=1000, **SHAPES["b_16"])`."""


@dataclass(frozen=True)
class VisionConfig:
    """What a `VisionTransformer` is made of.

    image: height and width in pixels, a multiple of `patch`. classes: of the head. width: of the
    residual stream, a multiple of heads. hidden: of the MLP (None: 4 width). channels: of an image.
    attention: a name in `blockshock.attention.METHODS` (None: flash_triton on CUDA, flash_torch
    elsewhere). eps: of LayerNorm.

    Raises:
        ValueError: a value that cannot be, or an attention method that neither bf16 on CUDA nor
            float32 on the CPU can run at these sizes here.
    """

    image: int
    patch: int
    classes: int
    width: int
    depth: int
    heads: int
    hidden: int | None = None
    channels: int = 3
    attention: str | None = None
    eps: float = 1e-6

    def __post_init__(self):
        if self.hidden is None:
            object.__setattr__(self, "hidden", 4 * self.width)
        for field in fields(self):
            value = getattr(self, field.name)
            counted = field.type is int or field.name == "hidden"
            if counted and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} = {value!r}: an int of at least 1 is needed")
        for name, part in (("image", "patch"), ("width", "heads")):
            whole, size = getattr(self, name), getattr(self, part)
            if whole % size:
                raise ValueError(
                    f"{name} = {whole} is no multiple of {part} = {size}; change one of them"
                )
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"eps = {self.eps}: it must be above 0")
        reason = self._attention_refused()
        if reason:
            raise ValueError(reason)

    @property
    def tokens(self) -> int:
        """Patches of an image, and the class token."""
        return (self.image // self.patch) ** 2 + 1

    def attention_on(self, device_type: str) -> str:
        """The attention method that runs on a device."""
        return self.attention or ATTENTION.get(device_type, ATTENTION["other"])[0]

    def _attention_refused(self) -> str | None:
        """Why attention runs neither in bf16 on CUDA nor in float32 on the CPU, or None."""
        size = 1, self.heads, self.tokens, self.width // self.heads
        reasons = [
            family.unsupported(self.attention_on(kind), size, size, dtype, kind, backward=True)
            for kind, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32))
        ]
        return None if None in reasons else reasons[0]


class VisionBlock(nn.Module):
    """Attention and MLP of one layer: x [B, T, width] -> [B, T, width]."""

    def __init__(self, config: VisionConfig, generator=None):
        super().__init__()
        width, linear = config.width, partial(_linear, generator=generator)
        self.config = config
        self.attention_norm = nn.LayerNorm(width, config.eps)
        self.qkv = linear(3 * width, width)
        self.out = linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, config.eps)
        up, down = linear(config.hidden, width), linear(width, config.hidden)
        self.mlp = nn.Sequential(OrderedDict(up=up, gelu=nn.GELU(), down=down))
        self.run = VisionBlock.compute

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width] in the dtype of the products."""
        return self.run(self, x)

    def compute(self, x: Tensor) -> Tensor:
        """What `forward` returns; `compile_vision` compiles it, and so no hooks of the module."""
        qkv = self.qkv(_normed(self.attention_norm, x)).unflatten(-1, (3, self.config.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attend = family.METHODS[self.config.attention_on(x.device.type)]
        x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(_normed(self.mlp_norm, x))


class VisionTransformer(nn.Module):
    """A classifier of images; `model(images)` are logits.

    config: its sizes. generator: of the initial weights, a CPU generator (None: PyTorch's default
    one); they are the same on every device. device: where the model is made.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch
        self.patches = nn.Conv2d(config.channels, width, patch, stride=patch, device="meta")
        _give(self.patches, _projection(width, config.channels * patch**2, generator))
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(_normal((1, config.tokens, width), POSITIONS_STD, generator))
        self.blocks = nn.ModuleList(VisionBlock(config, generator) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, config.eps)
        head = nn.Linear(width, config.classes, device="meta")
        self.head = _give(head, torch.zeros(config.classes, width))
        self.to(device)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, channels, image, image], in the weights' dtype -> logits [B, classes].

        Raises:
            ValueError: images of another shape.
        """
        config = self.config
        wanted = [config.channels, config.image, config.image]
        if list(images.shape[1:]) != wanted:
            raise ValueError(f"images {list(images.shape)}: [B, {str(wanted)[1:]} is needed")
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.class_token.to(patches.dtype).expand(len(images), -1, -1)
        x = torch.cat([tokens, patches], dim=1) + self.positions.to(patches.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(_normed(self.norm, x[:, 0]))


def compile_vision(model: VisionTransformer, **options) -> VisionTransformer:
    """Compiles each block whole (no graph breaks); in place, returns the model.

    What is compiled are the computations, not the modules' calls: hooks on a block run around them.
    Blocks of the same layers share one graph. options: for `torch.compile`.
    """
    compute = torch.compile(VisionBlock.compute, fullgraph=True, **options)
    for block in model.blocks:
        block.run = compute
    return model


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """In the weight's dtype, so that bf16 is normed by a float32 weight."""
    return norm(x.to(norm.weight.dtype))


def _normal(shape, std: float, generator) -> Tensor:
    return nn.init.trunc_normal_(
        torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator
    )


def _linear(rows: int, columns: int, *, generator) -> nn.Linear:
    # On the meta device first: nn.Linear would draw weights of its own.
    layer = nn.Linear(columns, rows, device="meta")
    return _give(layer, _projection(rows, columns, generator))


def _projection(rows: int, columns: int, generator) -> Tensor:
    return _normal((rows, columns), (2 / (rows + columns)) ** 0.5, generator)


def _give(layer: nn.Module, weight: Tensor) -> nn.Module:
    """The layer with this weight, as a matrix, and a bias of zeros."""
    layer.weight = nn.Parameter(weight.view(layer.weight.shape))
    layer.bias = nn.Parameter(torch.zeros(len(weight)))
    return layer
