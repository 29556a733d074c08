"""A weight W [N, K] by its kept tiles (BSR: block sparse rows), square ones of side b.

    values [kept, b, b]    the tiles in row-major order; what sticks out of W is zero
    lists                  which tiles they are, row by row and column by column (`block_lists`)

The transposed order holds numbers of tiles and no second copy of the values, so a write to the
values is seen by Y = X Wᵀ and by dX = dY W alike.
"""

import torch
from torch import Tensor

from blockshock import masks
from blockshock.block_sparse import tiles
from blockshock.kernels import block_lists, block_product
from blockshock.kernels.block_lists import Lists
from blockshock.kernels.block_plans import BLOCKS
from blockshock.linear.extras import DTYPES


def pack(
    weight: Tensor, block: int, *, sparsity: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Lists]:
    """The values and lists of a dense weight [N, K], on its device and in its dtype.

    sparsity: the (1 − sparsity) tiles with the largest mean of |W| are kept (`tiles.kept` says how
    many). mask: bool [⌈N / b⌉, ⌈K / b⌉], the tiles to keep. Neither: those that are not zero.

    Raises:
        ValueError: a weight that is not finite; a mask of another shape or dtype; no tile is kept;
            sparsity and mask; what `unsupported` names.
    """
    lists = block_lists.lists(choose(weight, block, sparsity, mask))
    return block_product.gather(weight, lists, block), lists


def unsupported(
    shape: tuple[int, int], block: int, sparsity: float | None, activation: str | None = None
) -> str | None:
    """Why no layer can have these options, or None: block, sparsity and activation."""
    if type(block) is not int or block not in BLOCKS:
        return f"block = {block!r}: use one of {', '.join(map(str, BLOCKS))}"
    if activation not in block_product.ACTIVATIONS:
        return f"activation = {activation!r}: use one of {list(block_product.ACTIVATIONS)}"
    if sparsity is not None:
        try:
            tiles.check(block, sparsity, shape)
        except ValueError as error:
            return str(error)
    return None


def bias_unsupported(weight: Tensor, bias: Tensor | None) -> str | None:
    """Why a bias cannot stand beside a weight [N, K], or None.

    A kernel would read past the end of one that is too short.
    """
    N = len(weight)
    if bias is None or (bias.shape == (N,) and _like(bias) == _like(weight)):
        return None
    return (
        f"the bias is {named(bias.dtype)} {list(bias.shape)} on {bias.device}: the weight needs "
        f"{named(weight.dtype)} [{N}] on {weight.device}"
    )


def _like(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def check(cls, weight: Tensor, bias: Tensor | None, **options) -> None:
    """Raises ValueError where a method cannot hold the weight and bias with these options."""
    if weight.dim() != 2 or weight.dtype not in DTYPES or weight.is_meta:
        raise ValueError(
            f"the weight is {named(weight.dtype)} {list(weight.shape)} on {weight.device}: [N, K] "
            f"is needed, with values, of {', '.join(map(named, DTYPES))}"
        )
    if reason := bias_unsupported(weight, bias):
        raise ValueError(reason)
    like = {"dtype": weight.dtype, "device_type": weight.device.type}
    if reason := cls.unsupported(*weight.shape, **like, **options):
        raise ValueError(reason)


def choose(weight: Tensor, block: int, sparsity: float | None, mask: Tensor | None) -> Tensor:
    """The tile mask that `pack` takes."""
    if reason := unsupported(tuple(weight.shape), block, sparsity):
        raise ValueError(reason)
    if mask is not None and sparsity is not None:
        raise ValueError(f"sparsity = {sparsity} and a mask: the mask says what is kept; give one")
    weight, square = weight.detach(), (block, block)
    masks.check_finite(weight)
    grid = tiles.grid(weight.shape, square)
    if mask is not None:
        if mask.dtype != torch.bool or tuple(mask.shape) != grid:
            raise ValueError(
                f"a mask of {named(mask.dtype)} {list(mask.shape)}: bool "
                f"{list(grid)} is needed, one for each {block} x {block} tile of "
                f"{list(weight.shape)}"
            )
        mask = mask.to(weight.device)
    elif sparsity is not None:
        mask = tiles.keep_top(tiles.magnitude(weight, square), sparsity)
    else:
        mask = nonzero(weight, block)
    if not mask.any():
        raise ValueError(
            f"none of the {mask.numel()} tiles of {block} x {block} is kept; a layer needs one"
        )
    return mask


def named(dtype: torch.dtype) -> str:
    """Such as float32."""
    return str(dtype).removeprefix("torch.")


def nonzero(weight: Tensor, block: int) -> Tensor:
    """The tile mask of what is not zero in a dense weight [N, K]; NaN is not."""
    return tiles.tile_sums(weight.detach().ne(0).to(torch.float32), (block, block)) > 0
