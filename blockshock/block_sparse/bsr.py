"""A weight W [N, K] by its kept tiles (BSR: block sparse rows), square ones of side b.

    values [kept, b, b]    the tiles in row-major order; what sticks out of W is zero
    lists                  which tiles they are, row by row and column by column (`block_lists`)

The transposed order holds numbers of tiles and no second copy of the values, so a write to the
values is seen by Y = X Wᵀ and by dX = dY W alike.
"""

import json
import zlib

import torch
from torch import Tensor

from blockshock import masks
from blockshock.block_sparse import tiles
from blockshock.kernels import block_lists, block_product
from blockshock.kernels.block_lists import Lists
from blockshock.kernels.block_plans import BLOCKS


def pack(
    weight: Tensor, block: int, *, sparsity: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Lists]:
    """The values and lists of a dense weight [N, K], on its device and in its dtype.

    sparsity: the (1 − sparsity) tiles with the largest mean of |W| are kept (`tiles.kept` says how
    many). mask: bool [⌈N / b⌉, ⌈K / b⌉], the tiles to keep. Neither: those that are not zero.

    Raises:
        ValueError: as `check`; a weight that is not finite; a mask of another shape or dtype; no
            tile is kept; sparsity and mask.
    """
    check(block, sparsity, tuple(weight.shape))
    masks.check_finite(weight)
    mask = choose(weight, block, sparsity, mask)
    lists = block_lists.lists(mask)
    if not lists.kept:
        raise ValueError(
            f"none of the {mask.numel()} tiles of {block} x {block} is kept; a layer needs one"
        )
    return block_product.gather(weight, lists, block), lists


def check(block: int, sparsity: float | None, shape: tuple[int, int]) -> None:
    """Raises ValueError for a block that is none of BLOCKS, or a sparsity that leaves no tile."""
    if type(block) is not int or block not in BLOCKS:
        raise ValueError(f"block = {block!r}: use one of {', '.join(map(str, BLOCKS))}")
    if sparsity is not None:
        tiles.check(block, sparsity, shape)


def choose(weight: Tensor, block: int, sparsity: float | None, mask: Tensor | None) -> Tensor:
    """The tile mask that `pack` takes."""
    grid = tiles.grid(weight.shape, (block, block))
    if mask is None:
        weight = weight.detach()
        if sparsity is None:
            return tiles.tile_sums(weight.abs(), (block, block)) > 0
        return tiles.keep_top(tiles.magnitude(weight, (block, block)), sparsity)
    if sparsity is not None:
        raise ValueError(f"sparsity = {sparsity} and a mask: the mask says what is kept; give one")
    if mask.dtype != torch.bool or tuple(mask.shape) != grid:
        raise ValueError(
            f"a mask of {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}: bool "
            f"{list(grid)} is needed, one for each {block} x {block} tile of {list(weight.shape)}"
        )
    return mask.to(weight.device)


def save(lists: Lists, about: dict) -> Tensor:
    """Lists for a state_dict: uint8, so that what copies tensors copies them.

    A line of JSON with `about` and a digest of the tile mask, then the mask, a byte a tile. It is
    no buffer, so what averages buffers cannot change it.
    """
    mask = lists.mask().view(torch.uint8).flatten()
    line = json.dumps(about | {"digest": _digest(mask)}).encode() + b"\n"
    return torch.cat([torch.frombuffer(bytearray(line), dtype=torch.uint8).to(mask.device), mask])


def load(state: Tensor, grid: tuple[int, int], about: dict) -> Tensor:
    """The tile mask of what `save` wrote, on the CPU.

    Raises:
        ValueError: another thing was saved, or the mask was changed since.
    """
    try:
        line, _, rest = state.cpu().numpy().tobytes().partition(b"\n")
        told = json.loads(line)
        digest = told.pop("digest")
    except (ValueError, AttributeError, TypeError, KeyError):
        raise ValueError(
            "the state does not say which tiles it holds, as a dense layer's; load that before the "
            "layer is made block-sparse"
        ) from None
    if told != about:
        raise ValueError(f"the state is of {told}, the layer is {about}; make the layer like it")
    mask = torch.frombuffer(bytearray(rest), dtype=torch.uint8)
    if len(rest) != grid[0] * grid[1] or digest != _digest(mask):
        raise ValueError("the state's tile mask was changed after it was saved; save it again")
    return mask.view(torch.bool).view(grid)


def _digest(mask: Tensor) -> int:
    return zlib.crc32(mask.cpu().numpy().tobytes())
