"""Tiles of a weight W [N, K]: which are kept, and sums over each.

    tile t = (r, c) is W[r b0 : (r + 1) b0, c b1 : (c + 1) b1],   r < ⌈N / b0⌉,  c < ⌈K / b1⌉

The last row and column of tiles are smaller where b0 or b1 does not divide the size. A tile mask
is bool [⌈N / b0⌉, ⌈K / b1⌉]; True keeps the tile. Nothing here waits for the device.
"""

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

Block = tuple[int, int]  # rows and columns of a tile


def pair(block: int | Block) -> Block:
    """(rows, columns) of a tile; one number makes square tiles.

    Raises:
        ValueError: not one or two whole numbers of at least 1.
    """
    sides = tuple(block) if isinstance(block, tuple | list) else (block, block)
    if len(sides) != 2 or not all(type(side) is int and side >= 1 for side in sides):
        raise ValueError(
            f"block = {block!r}: a whole number of at least 1 is needed, or (rows, columns) of two"
        )
    return sides


def grid(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """Rows and columns of tiles in a weight [N, K]."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def check(block: int | Block, sparsity: float, shape: tuple[int, int]) -> Block:
    """The tile as (rows, columns), if some of a weight of this shape is kept.

    Raises:
        ValueError: block is not one or two whole numbers of at least 1; sparsity is outside [0, 1);
            (1 - sparsity) of the tiles is less than one.
    """
    block = pair(block)
    rows, columns = grid(shape, block)
    try:
        kept(rows * columns, sparsity)
    except ValueError as error:
        raise ValueError(f"block = {block} in a weight {list(shape)}: {error}") from None
    return block


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError where the share of the tiles that is dropped is not in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity = {sparsity!r}: a number from 0 to below 1 is needed")


def kept(tiles: int, sparsity: float) -> int:
    """How many tiles stay: tiles − ⌊sparsity · tiles⌋, so at least (1 − sparsity) of them.

    The product is rounded to a millionth first: 0.29 of 100 is 29, also in floating point.

    Raises:
        ValueError: sparsity outside [0, 1), or (1 − sparsity) · tiles is less than one.
    """
    check_sparsity(sparsity)
    dropped = round(sparsity * tiles, 6)
    if tiles - dropped < 1:
        raise ValueError(
            f"sparsity = {sparsity} of {tiles} tiles leaves less than one tile; lower the "
            "sparsity, or choose a smaller block"
        )
    return tiles - math.floor(dropped)


def keep_top(scores: Tensor, sparsity: float) -> Tensor:
    """The mask of the (1 − sparsity) tiles with the largest scores; `kept` says the rounding.

    scores: any real dtype [rows, columns]. Of equal scores the first in row-major order stay, so
    that exactly `kept` tiles do.

    Raises:
        ValueError: as `kept`.
    """
    return keep_most(scores, kept(scores.numel(), sparsity))


def keep_most(scores: Tensor, count: int | Tensor) -> Tensor:
    """The mask of the `count` tiles with the largest scores.

    count: a number, or an integer tensor [] on the scores' device. A tensor may change between the
    replays of a CUDA graph, and under `torch.compile` without another compilation.
    """
    order = scores.detach().flatten().argsort(descending=True, stable=True)
    chosen = torch.arange(order.numel(), device=order.device) < count
    return torch.empty_like(chosen).scatter_(0, order, chosen).view(scores.shape)


def expand(mask: Tensor, shape: tuple[int, int], block: Block) -> Tensor:
    """A value per tile [rows, columns] as a value per element [N, K], in the same dtype."""
    b0, b1 = block = _within(shape, block)
    rows, columns = grid(shape, block)
    whole = mask[:, None, :, None].expand(rows, b0, columns, b1)
    return whole.reshape(rows * b0, columns * b1)[: shape[0], : shape[1]]


def masked(weight: Tensor, mask: Tensor, block: Block) -> Tensor:
    """weight [N, K] with zeros in the tiles that are not kept, in its dtype.

    They are written, not multiplied in: an infinity or NaN in a dropped tile is gone.
    """
    zero, block = weight.new_zeros(()), _within(weight.shape, block)
    if not _even(weight, block):
        return torch.where(expand(mask, weight.shape, block), weight, zero)
    whole = torch.where(mask[:, None, :, None], _tiled(weight, block), zero)
    return whole.reshape(weight.shape)


def tile_sums(tensor: Tensor, block: Block) -> Tensor:
    """The sum of each tile of [N, K]: [rows, columns], float32, or float64 for float64."""
    block = _within(tensor.shape, block)
    if not _even(tensor, block):
        (N, K), (rows, columns) = tensor.shape, grid(tensor.shape, block)
        tensor = F.pad(tensor, (0, columns * block[1] - K, 0, rows * block[0] - N))
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return _tiled(tensor, block).sum((1, 3), dtype=wide)


def magnitude(weight: Tensor, block: Block) -> Tensor:
    """The mean of |W| in each tile [rows, columns], in the dtype of `tile_sums`.

    A mean, so that the smaller tiles at the edges compare with the others.
    """
    sums = tile_sums(weight.detach().abs(), block)
    (N, K), (b0, b1), (rows, columns) = weight.shape, block, sums.shape
    heights = (N - b0 * torch.arange(rows, device=sums.device)).clamp(max=b0)
    widths = (K - b1 * torch.arange(columns, device=sums.device)).clamp(max=b1)
    return sums / (heights[:, None] * widths)


def _within(shape: tuple[int, int], block: Block) -> Block:
    """The tile cut to the size of the weight, so that nothing past it takes memory."""
    return max(1, min(block[0], shape[0])), max(1, min(block[1], shape[1]))


def _even(tensor: Tensor, block: Block) -> bool:
    return tensor.shape[0] % block[0] == 0 and tensor.shape[1] % block[1] == 0


def _tiled(tensor: Tensor, block: Block) -> Tensor:
    """[rows, b0, columns, b1]: element (i, j) of tile (r, c) is [r, i, c, j]."""
    (rows, columns), (b0, b1) = grid(tensor.shape, block), block
    return tensor.reshape(rows, b0, columns, b1)
