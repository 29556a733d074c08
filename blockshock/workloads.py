"""What the layers are fed: inputs X [B, K], targets [B, N] and losses. Weights: sources.py.

Inputs are made in blocks of 1024 rows, in float32, and rounded once. Each block draws from a
generator of its own; what all rows have in common (the scale of a channel, the values that
attention mixes) is drawn from a shared one. There is no matrix product in the making, so the bits
are the same whatever precision the products are set to. The same seed gives the same bits on
every rank; CPU and CUDA have different generators. All inputs are finite in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from blockshock.masks import check_finite
from blockshock.sources import (
    FileTensor,
    FileWeight,
    SeededWeight,
    TensorWeight,
    WeightSource,
    as_source,
    generator,
    row_blocks,
    seeded_bias,
)

__all__ = [
    "INPUTS",
    "LOSSES",
    "TARGETS",
    "FileWeight",
    "SeededWeight",
    "TensorWeight",
    "WeightSource",
    "as_source",
    "make_input",
    "make_target",
    "row_blocks",
    "seeded_bias",
]


@dataclass(frozen=True)
class Block:
    """Rows start..start+rows of an input of K columns, and the two streams they are drawn from."""

    start: int
    rows: int
    K: int
    own: torch.Generator  # a stream of this block
    shared: torch.Generator  # a stream that begins anew for every block

    def normal(self) -> Tensor:
        return _normal(self.own, self.rows, self.K)


def make_input(
    kind: str,
    B: int,
    K: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    **options,
) -> Tensor:
    """An input [B, K] of the kind that INPUTS names; its function documents the options.

    Raises:
        ValueError: unknown kind or option value; values that are not finite in dtype; "file":
            see there.
    """
    if kind not in INPUTS:
        raise ValueError(f"unknown input {kind!r}; use one of {', '.join(INPUTS)}")
    x = torch.empty(B, K, dtype=dtype, device=device)
    for index, (start, stop) in enumerate(row_blocks(B)):
        own = generator(device, f"input/{kind}", seed, index)
        shared = generator(device, f"input/{kind}/shared", seed)
        x[start:stop] = INPUTS[kind](Block(start, stop - start, K, own, shared), **options)
    check_finite(x, what=f"the {kind} input")
    return x


def _gaussian(block: Block) -> Tensor:
    """Standard normal."""
    return block.normal()


def _uniform(block: Block) -> Tensor:
    """Uniform in [-1, 1) before rounding."""
    return _uniform_values(block.own, block.rows, block.K)


def _activation(block: Block, *, clip: float = 3.0) -> Tensor:
    """Normal, of a scale that differs from channel to channel (log-normal, so that a few channels
    stand out), clipped to [-clip, clip]."""
    if clip <= 0:
        raise ValueError(f"clip = {clip}: values are clipped to [-clip, clip]; use clip > 0")
    return (block.normal() * _normal(block.shared, block.K).exp()).clamp_(-clip, clip)


def _mlp(block: Block, *, activation: str = "gelu", layer_norm: bool = False) -> Tensor:
    """What the second layer of a transformer's MLP is given: activation(hidden), "gelu", "silu" or
    "relu", or silu(gate) * hidden for "swiglu". Channels have a mean and a scale of their own.

    With layer_norm each row is normalised over K afterwards (mean 0, variance 1), as in models
    that normalise inside the MLP: Shleifer et al., "NormFormer", 2021.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    mean = _normal(block.shared, block.K) * 0.5 - 0.5  # most units are off most of the time
    scale = (_normal(block.shared, block.K) * 0.5).exp()
    x = ACTIVATIONS[activation](block, mean, scale)
    return F.layer_norm(x, (block.K,)) if layer_norm else x


def _hidden(block: Block, mean: Tensor, scale: Tensor) -> Tensor:
    return block.normal() * scale + mean


def _swiglu(block: Block, mean: Tensor, scale: Tensor) -> Tensor:
    return F.silu(_hidden(block, mean, scale)) * (block.normal() * scale)


def _attention(block: Block, *, context: int = 32) -> Tensor:
    """What the output projection of attention is given: in each head (64 columns, the last one
    what is left) every row mixes the same `context` values by weights that are a softmax of
    normal scores; the values are standard normal."""
    if context < 1:
        raise ValueError(f"context = {context}: attention mixes at least 1 value")
    heads = -(-block.K // 64)
    weights = (2 * _normal(block.own, context, block.rows, heads)).softmax(dim=0)
    values = _normal(block.shared, context, heads, 64)
    x = torch.zeros(block.rows, heads, 64, device=values.device)
    for weight, value in zip(weights, values, strict=True):
        x.addcmul_(weight[:, :, None], value)
    return x.view(block.rows, heads * 64)[:, : block.K]


def _conv(block: Block) -> Tensor:
    """What a 3x3 convolution is as a product: unfolded patches (columns: channel, then place in
    the patch) of 8x8 feature maps that are smooth, 4x4 normal maps enlarged, after a relu."""
    channels, images = -(-block.K // 9), -(-block.rows // 64)
    maps = _normal(block.own, images, channels, 4, 4)
    maps = F.interpolate(maps, size=(8, 8), mode="bilinear", align_corners=True).relu_()
    patches = F.unfold(maps, kernel_size=3, padding=1)  # [images, channels * 9, 64]
    return patches.transpose(1, 2).flatten(0, 1)[: block.rows, : block.K]


def _file(block: Block, *, path: str | Path, name: str | None = None) -> Tensor:
    """The first B rows of a tensor [..., K] in a .safetensors or .npy file, leading dimensions
    taken as one; the seed is not used. See sources.FileTensor for path, name and their errors.

    Raises:
        ValueError: another K than the case's, fewer rows than the case's B.
    """
    file = FileTensor(path, name)
    *leading, K = file.shape
    if K != block.K or not leading:
        raise ValueError(
            f"{file} has shape {file.shape}: the case reads rows of K = {block.K}; set K = {K}"
        )
    each = 1  # rows for one index of the first dimension
    for size in leading[1:]:
        each *= size
    stop = block.start + block.rows
    if each * leading[0] < stop:
        raise ValueError(
            f"{file} has {each * leading[0]} rows, the case reads at least {stop}; set B lower"
        )
    first = block.start // each
    read = file.read(first, -(-stop // each)).reshape(-1, K)
    return read[block.start - first * each : stop - first * each].to(block.own.device)


def make_target(
    kind: str, *shape: int, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Tensor:
    """A target of the given shape: "zeros", "normal" (standard) or "uniform" (in [-1, 1)).

    Raises:
        ValueError: unknown kind.
    """
    if kind not in TARGETS:
        raise ValueError(f"unknown target {kind!r}; use one of {', '.join(TARGETS)}")
    return TARGETS[kind](generator(device, f"target/{kind}", seed), *shape).to(dtype)


def _sum(y: Tensor, target: Tensor | None = None) -> Tensor:
    """Σ y; the gradient is 1 everywhere. The target is not used."""
    return y.sum(dtype=_wide(y))


def _mse_zero(y: Tensor, target: Tensor | None = None) -> Tensor:
    """mean(y²). The target is not used."""
    return _mean_square(y)


def _mse_target(y: Tensor, target: Tensor | None = None) -> Tensor:
    """mean((y - target)²); ValueError unless the target has the shape of y.

    The difference is rounded to y's dtype, as y itself was; what is summed is not.
    """
    if target is None or target.shape != y.shape:
        shape = None if target is None else tuple(target.shape)
        raise ValueError(
            f"a target of shape {shape} for an output of {tuple(y.shape)}: mse_target compares "
            "value by value; make the target with make_target and the output's shape"
        )
    return _mean_square(y - target.to(y.dtype))


def _mean_square(x: Tensor) -> Tensor:
    # By the norm, which reads x once and sums wide: x.float() would write a copy twice its size,
    # and the loss would weigh in every training step more than the sum over ranks.
    return torch.linalg.vector_norm(x, dtype=_wide(x)).square() / x.numel()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _normal(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, device=source.device)


def _uniform_values(source: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=source, device=source.device).mul_(2).sub_(1)


def _zeros(source: torch.Generator, *shape: int) -> Tensor:
    return torch.zeros(shape, device=source.device)


ACTIVATIONS = {
    "gelu": lambda *parts: F.gelu(_hidden(*parts)),
    "silu": lambda *parts: F.silu(_hidden(*parts)),
    "relu": lambda *parts: F.relu(_hidden(*parts)),
    "swiglu": _swiglu,
}

INPUTS = {
    "gaussian": _gaussian,
    "uniform": _uniform,
    "activation": _activation,
    "mlp": _mlp,
    "attention": _attention,
    "conv": _conv,
    "file": _file,
}

TARGETS = {"zeros": _zeros, "normal": _normal, "uniform": _uniform_values}

LOSSES = {"sum": _sum, "mse_zero": _mse_zero, "mse_target": _mse_target}
