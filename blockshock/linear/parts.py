"""What the linear methods share: reading a weight in row blocks, and who holds which part.

No rank needs the whole weight. A weight is a source that yields row blocks (`sources`); each
method takes from a block what it holds. The same taking, applied to the dense gradient, says what
a parameter's gradient must be.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blockshock import masks, sources
from blockshock.distributed import collectives, functions
from blockshock.distributed import reduce as sums
from blockshock.kernels import columns
from blockshock.linear import ways
from blockshock.measure.floor import Cost, all_gather_wire, all_reduce_wire, product_cost

REDUCES = sums.SUMS  # of the superposed methods; the first is the usual one


@dataclass(frozen=True)
class Term:
    """The part of W that a rank of a 2:4 method holds: one of two terms of one column shard.

    With 2S ranks, K is cut in S shards of columns and ranks 2s, 2s + 1 hold the complementary
    terms of shard s:  Y = Σ_s Σ_g X[:, k_s] W(g)[:, k_s]ᵀ.
    """

    index: int
    start: int
    stop: int

    @classmethod
    def of(cls, columns: int, group=None, *, multiple: int = 4) -> "Term":
        """This rank's term. Raises ValueError for an odd number of ranks or a bad K."""
        rank, ranks = collectives.group_rank(group), collectives.group_size(group)
        reason = term_unsupported(columns, ranks, multiple=multiple)
        if reason:
            raise ValueError(reason)
        width = columns // (ranks // 2)
        shard = rank // 2
        return cls(rank % 2, shard * width, (shard + 1) * width)

    @property
    def width(self) -> int:
        """Columns of the shard."""
        return self.stop - self.start

    @property
    def columns(self) -> slice:
        """The shard's columns of W, and of X."""
        return slice(self.start, self.stop)


def term_mask(pattern: str, rows: Tensor, term: Term, *, start: int, seed: int) -> Tensor:
    """The mask [n, width] of this rank's term for the rows [n, K] that begin at row `start`.

    Made from the whole rows, so that every rank of every number of ranks makes the same mask.
    """
    mask = masks.make(pattern, rows, start=start, seed=seed)[:, term.columns]
    return ~mask if term.index else mask.contiguous()


def term_unsupported(columns: int, ranks: int, *, multiple: int = 4) -> str | None:
    """Why `ranks` ranks cannot hold the pairs of terms of a weight with K columns, or None."""
    if ranks % 2 or ranks < 2:
        return (
            f"{ranks} rank{'' if ranks == 1 else 's'} cannot hold pairs of complementary terms; "
            "use an even number of ranks, or a dense method"
        )
    shards, rule = ranks // 2, f"K = {columns} is not a multiple of {multiple * (ranks // 2)}"
    if columns % multiple:  # for any number of ranks
        return f"{rule}; pad it"
    if columns % (multiple * shards):
        return f"{rule} ({multiple} for each of {shards} column shards); pad it or use fewer ranks"
    return None


def reduce_unsupported(reduce: str | None, dtype: torch.dtype, device_type: str) -> str | None:
    """Why a sum over ranks cannot be asked for, or None; None stands for a method's usual one."""
    return None if reduce is None else sums.unsupported(reduce, dtype, device_type)


def checked(cls, weight, group=None, **options):
    """A weight source that the method `cls` can hold with these options; ValueError otherwise."""
    source = sources.as_source(weight)
    reason = cls.unsupported(
        *source.shape,
        dtype=source.dtype,
        device_type=torch.device(source.device).type,
        ranks=collectives.group_size(group),
        **options,
    )
    if reason:
        raise ValueError(reason)
    return source


def row_cost(layer, batch: int, width: int, like: Tensor | None = None) -> Cost:
    """Per rank, one dense forward product of `width` columns, summed; dX is gathered.

    like: has the products' dtype, where the weight's is another.
    """
    N, size = layer.weight.shape[0], (layer.weight if like is None else like).element_size()
    return product_cost(
        batch,
        N,
        width,
        size,
        wire_forward=all_reduce_wire(batch * N * size, layer.ranks),
        wire_backward=all_gather_wire(batch * layer.in_features * size, layer.ranks),
    )


def apply(layer, x: Tensor, like: Tensor | None = None) -> Tensor:
    """Y [..., N] of x [..., K], by the fastest way (`ways`); like: as in `row_cost`.

    Raises RuntimeError for a layer whose weight is computed, of one rank's part.
    """
    if "weight" not in layer._parameters:
        raise RuntimeError(
            "the weight of this layer is computed by a parametrization, which sees one rank's part "
            "alone; remove it, and parametrize before `convert`, which leaves such layers"
        )
    flat = flatten(x, layer.input.columns, layer.weight if like is None else like)
    y = functions.apply(layer, flat, ways)
    return unflatten(y, x)


def even_unsupported(name: str, size: int, ranks: int) -> str | None:
    """Why a dimension cannot be dealt out evenly over the ranks, or None."""
    if size % ranks:
        return f"{name} = {size} is not a multiple of {ranks} ranks; pad it or use fewer ranks"
    return None


def rows_unsupported(pattern: str, N: int) -> str | None:
    """Why a pattern cannot mask N rows, or None."""
    known = masks.PATTERNS.get(pattern)  # an unknown one is refused by `masks.make`, with a list
    if known and known.transposable and N % 4:
        return f"N = {N} is not a multiple of 4, the height of a tile; pad it or use mask 1100"
    return None


def blocks(source, start: int = 0, stop: int | None = None):
    """Yields (start, stop, rows) over rows start..stop of a weight source.

    A source refuses a weight that is NaN or infinite with a ValueError naming the place.
    """
    stop = source.shape[0] if stop is None else stop
    for low, high in sources.row_blocks(stop - start):
        yield start + low, start + high, source.rows(start + low, start + high)


def take_columns(source, columns: slice | Tensor = slice(None)) -> Tensor:
    """Some columns of every row: [N, number of columns], read block by block."""
    taken = (rows[:, columns] for _, _, rows in blocks(source))
    return _stack(taken, source, source.shape[0])


def take_rows(source, start: int, stop: int) -> Tensor:
    """Rows start..stop whole: [stop - start, K], read block by block."""
    taken = (rows for _, _, rows in blocks(source, start, stop))
    return _stack(taken, source, stop - start)


def _stack(blocks, source, height: int) -> Tensor:
    part, filled = None, 0
    for block in blocks:
        if part is None:
            part = torch.empty(height, block.shape[1], dtype=source.dtype, device=source.device)
        part[filled : filled + block.shape[0]] = block
        filled += block.shape[0]
    return part


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of products with x inside autocast, None outside; the meta device has none."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def flatten(x: Tensor, width: int, like: Tensor) -> Tensor:
    """x [..., K] -> [B, K]. Raises ValueError when K, or the dtype or device of `like`, are not
    x's.

    Under autocast x is cast first.
    """
    if x.shape[-1] != width:
        raise ValueError(f"x has {x.shape[-1]} features, the layer takes {width}")
    if autocast_dtype(x) and x.is_floating_point():
        x = x.to(like.dtype)
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, the layer {like.dtype} on {like.device}; "
            "convert one of them"
        )
    return x.reshape(-1, width)


def unflatten(y: Tensor, x: Tensor) -> Tensor:
    """y [B, N] -> [..., N] for an x [..., K]. As F.linear's it is no view: FSDP's hooks are on the
    tensor that a layer returns, and are lost where that is a view and is written to.

    No backward may have saved y: writes to the result would not be noticed.
    """
    if x.dim() == 2:
        return y
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def place_pairs(terms: list[Tensor], out: Tensor, *, places: columns.Places) -> None:
    """Writes the kept columns of all terms, [B, K/2S] each in rank order, into out [B, K].

    places: those that the first term of every pair keeps of a group; the second has the others.
    """
    width = out.shape[1] // (len(terms) // 2)
    for shard, (first, second) in enumerate(zip(terms[::2], terms[1::2], strict=True)):
        columns.join(first, second, places, out[:, shard * width : (shard + 1) * width])


def add_pairs(partials: list[Tensor], out: Tensor) -> None:
    """Adds the two terms' partials of every shard, [B, K/S] each in rank order, into out [B, K]."""
    width = out.shape[1] // (len(partials) // 2)
    for shard, (first, second) in enumerate(zip(partials[::2], partials[1::2], strict=True)):
        torch.add(first, second, out=out[:, shard * width : (shard + 1) * width])


def assemble(place: Callable[[Tensor], None], shape, part: Tensor, group=None) -> Tensor:
    """The dense [N, K] on every rank; `place` writes this rank's part into zeros.

    The parts do not overlap, so the sum over the ranks only copies: the values are exact.
    """
    full = torch.zeros(shape, dtype=part.dtype, device=part.device)
    with torch.no_grad():
        place(full)
        return collectives.all_reduce(full, group)
