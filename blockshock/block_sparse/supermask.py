"""Layers that learn which tiles of their weight to keep: a score per tile, the largest ones stay.

    m = the `kept` tiles with the largest scores          m [rows, columns], one bit a tile
    Wm = W ∘ expand(m)        Y = X Wmᵀ + bias            W [N, K]
    dWm = dYᵀ X
    ds_t = Σ over tile t of dWm ∘ W                       for every tile, kept or not
    dW = dWm ∘ expand(m)     gradient="masked"
    dW = dWm                 gradient="through"

The scores' gradient is straight-through: the step from score to bit counts as the identity, so ds_t
is the derivative of the loss by m_t as if m_t were a real number (Ramanujan et al.,
arXiv:1911.13299, section 3: a score per weight, and the weights fixed).

"masked" is the derivative of Y = X (W ∘ m)ᵀ: a dropped tile has no gradient until its score brings
it back. (An optimizer's momentum and weight decay still act on it.)
"through" is SuperBlock's (https://pytorch.org/blog/speeding-up-vits, `ApplyMask` in torchao): all
of W is trained as if nothing were dropped, so that a tile comes back with a weight that followed.
torchao also lets dWm through to the scores without the factor W; then a score does not see whether
a tile's weights help or hurt, so that here the factor stays in both.
"""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockshock.block_sparse import tiles

GRADIENTS = ("masked", "through")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a layer is masked.

    block: rows and columns of a tile, or one number for both; of a convolution, output and input
    channels with all their taps. sparsity: the share of the tiles that is dropped, in [0, 1);
    `tiles.kept` says the rounding. gradient: of the weight, "masked" or "through". fixed_mask: the
    scores are not trained. fixed_weight: the weight is not trained.

    Raises:
        ValueError: a block or sparsity that cannot be; another gradient.
    """

    block: int | tiles.Block
    sparsity: float
    gradient: str = "masked"
    fixed_mask: bool = False
    fixed_weight: bool = False

    def __post_init__(self):
        object.__setattr__(self, "block", tiles.pair(self.block))
        tiles.check_sparsity(self.sparsity)
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient = {self.gradient!r}: use one of {', '.join(GRADIENTS)}")


class Supermask:
    """What the two layers add to the ordinary ones.

    scores: nn.Parameter [rows, columns], the `grid` of tiles; float32, or float64 under a float64
    weight. At first the mean of |W| in each tile, over the mean of these, so that a step means the
    same in every layer; a model that was trained dense keeps its largest tiles so. The mask is
    found anew in every forward, on the device, so a captured or compiled step follows the scores
    and the sparsity.
    """

    plain: ClassVar[type[nn.Module]]  # the ordinary layer

    @classmethod
    def from_dense(cls, layer: nn.Module, **settings) -> "Supermask":
        """A layer with copies of an ordinary layer's weight and bias. settings: of `Settings`.

        Raises:
            ValueError: the layer is another one; what `Settings` and `tiles.check` refuse.
        """
        if type(layer) is not cls.plain:
            raise ValueError(
                f"{cls.__name__} is made from an nn.{cls.plain.__name__}, not a "
                f"{type(layer).__name__}"
            )
        return cover(copy.deepcopy(layer), Settings(**settings))

    @property
    def sparsity(self) -> float:
        """The share of the tiles that is dropped. Reading it waits for the device.

        It may be set at any time, also between the replays of a CUDA graph. Raises ValueError as
        `tiles.kept`.
        """
        return 1 - int(self.kept // 2) / math.prod(self.grid)

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        # Twice the count and one: where a model's buffers are averaged, PyTorch cuts off the
        # fractions of whole numbers, and the count must not lose one.
        self.kept.fill_(2 * tiles.kept(math.prod(self.grid), value) + 1)

    @property
    def mask(self) -> Tensor:
        """The tiles that are kept, bool [rows, columns].

        Raises RuntimeError where this rank holds a share of the scores and not all.
        """
        if self.scores.shape != self.grid:
            raise RuntimeError(
                f"scores {list(self.scores.shape)} are a share of {list(self.grid)}: the mask is "
                "known inside the layer's forward; outside read full_state_dict()"
            )
        return tiles.keep_most(self.scores, self.kept // 2)

    def masked_weight(self) -> Tensor:
        """W ∘ expand(m), shaped like the weight and in its dtype; with gradients to both."""
        matrix, block = self._matrix()
        through = self.gradient == "through"
        found = _MaskedWeight.apply(matrix, self.scores, self.mask, block, through)
        return found.view_as(self.weight)

    @torch.no_grad()
    def reset_scores(self) -> None:
        """Scores the tiles by the weight as it is, after another one was loaded."""
        found = tiles.magnitude(*self._matrix())
        tiny = torch.finfo(found.dtype).tiny
        self.scores.copy_(found / found.mean().clamp(min=tiny))

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The ordinary layer again, in place: the same object and parameters, without scores.

        The mask is multiplied into the weight, so what was dropped is zero from here on. Raises
        ValueError as `check_weight_is_held`.
        """
        self.check_weight_is_held("the layer")
        self.weight.copy_(self.masked_weight())
        del self.scores, self.kept, self.block, self.grid, self.gradient
        self.__class__ = self.plain
        return self

    def check_weight_is_held(self, name: str) -> None:
        """Raises ValueError where the weight is computed anew in each forward, so that a mask that
        is written into it would be lost."""
        if "weight" not in self._parameters:
            raise ValueError(
                f"the weight of {name!r} is computed (weight_norm, spectral_norm, pruning), not "
                "held; remove that (remove_parametrizations, prune.remove) before it is folded"
            )

    def get_extra_state(self) -> Tensor:
        """The block: scores of another block may have the same shape."""
        return torch.tensor(self.block)

    def set_extra_state(self, state: Tensor) -> None:
        """The block is compared before anything is loaded."""

    def _load_from_state_dict(self, states, prefix, *others) -> None:
        told = states.get(f"{prefix}_extra_state")
        if told is not None and told.tolist() != list(self.block):
            found = (
                f"tiles {tuple(told.tolist())}" if told.numel() == 2 else "another kind of layer"
            )
            others[-1].append(
                f"{prefix.rstrip('.') or 'the layer'}: the state has scores of {found}, the "
                f"layer of {self.block}; make the layer with the same block"
            )
            return
        super()._load_from_state_dict(states, prefix, *others)

    def extra_repr(self) -> str:
        """As the ordinary layer's, with the block and the gradient."""
        return f"{super().extra_repr()}, block={self.block}, gradient={self.gradient!r}"

    def _matrix(self) -> tuple[Tensor, tiles.Block]:
        """The weight as a matrix, and the tile in it: all taps of a channel stand together."""
        taps = self.weight[0, 0].numel()
        return self.weight.flatten(1), (self.block[0], self.block[1] * taps)


class SupermaskLinear(Supermask, nn.Linear):
    """An nn.Linear that learns which tiles of its weight [N, K] to keep.

    settings: of `Settings`. A state_dict has the dense weight, the bias, the
    scores, how many tiles are kept, and the block.

    Raises:
        ValueError: what `Settings` and `tiles.check` refuse.
    """

    plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype: torch.dtype | None = None,
        **settings,
    ):
        settings = Settings(**settings)
        super().__init__(in_features, out_features, bias, device, dtype)
        cover(self, settings)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return F.linear(x, self.masked_weight(), self.bias)


class SupermaskConv2d(Supermask, nn.Conv2d):
    """An nn.Conv2d that learns which tiles of channels to keep: b0 outputs by b1 inputs.

    A tile has all taps of its channels, so it is a tile [b0, b1 · height · width] of the matrix
    [outputs, inputs / groups · height · width]. args and options: of nn.Conv2d, and those of
    `Settings` by name. A state_dict has what `SupermaskLinear`'s has.

    Raises:
        ValueError: what `Settings` and `tiles.check` refuse.
    """

    plain = nn.Conv2d

    def __init__(self, *args, **options):
        names = Settings.__dataclass_fields__.keys()
        settings = Settings(**{name: options.pop(name) for name in names & options.keys()})
        super().__init__(*args, **options)
        cover(self, settings)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, height, width] -> [B, outputs, ...], as nn.Conv2d."""
        return self._conv_forward(x, self.masked_weight(), self.bias)


def cover(layer: nn.Module, settings: Settings) -> Supermask:
    """Turns an nn.Linear or nn.Conv2d into one with a supermask, in place.

    The object and its parameters stay, and with them its hooks and an optimizer that was made
    before; the scores are new. Raises ValueError as `tiles.check`, and then changes nothing.
    """
    weight = layer.weight
    tiles.check(settings.block, settings.sparsity, weight.shape[:2])
    layer.__class__ = COVERED.get(type(layer), type(layer))
    layer.block, layer.gradient = settings.block, settings.gradient
    layer.grid = tiles.grid(weight.shape[:2], layer.block)
    wide = torch.promote_types(weight.dtype, torch.float32)
    scores = weight.new_empty(layer.grid, dtype=wide)
    layer.scores = nn.Parameter(scores, requires_grad=not settings.fixed_mask)
    layer.register_buffer("kept", torch.zeros((), dtype=torch.int64, device=weight.device))
    layer.sparsity = settings.sparsity
    layer.reset_scores()
    if settings.fixed_weight:
        weight.requires_grad_(False)
    return layer


class _MaskedWeight(torch.autograd.Function):
    """The algebra above for W [N, K]: (W, scores, mask) -> Wm."""

    @staticmethod
    def forward(weight, scores, mask, block, through):
        return tiles.masked(weight, mask, block)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, scores, mask, ctx.block, ctx.through = inputs
        ctx.save_for_backward(weight, mask)
        ctx.scores_dtype = scores.dtype

    @staticmethod
    def backward(ctx, d_masked):
        weight, mask = ctx.saved_tensors
        d_weight = d_scores = None
        if ctx.needs_input_grad[0]:
            d_weight = d_masked if ctx.through else tiles.masked(d_masked, mask, ctx.block)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(weight.dtype, torch.float32)
            d_scores = tiles.tile_sums(d_masked.to(wide) * weight, ctx.block).to(ctx.scores_dtype)
        return d_weight, d_scores, None, None, None


COVERED = {nn.Linear: SupermaskLinear, nn.Conv2d: SupermaskConv2d}
"""The ordinary layers, and what `cover` makes of each."""
