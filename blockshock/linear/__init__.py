"""One linear layer, Y = X Wᵀ (+ b), computed in several ways: `METHODS`.

A method is an `nn.Module`, a `split.Split` where several ranks hold it, with, besides `forward`,

    method                              its name
    from_dense(weight, bias=None, *, group=None, **options)   builds this rank's part
    unsupported(N, K, *, dtype, device_type, ranks, mask=None)
                                        why it cannot run, or None
    to_dense()                          the dense [N, K] on every rank
    restrict(source)                    this rank's part of another dense [N, K]
    cost(batch)                         arithmetic and bytes of one product
    masks, policies                     what it can be asked for; the first is the usual one

and optionally `paths(batch)` and `weight_bytes()`.
"""

from blockshock.linear.block_shock import BlockShock
from blockshock.linear.dense import DenseSingle, DenseTPColumn, DenseTPRow
from blockshock.linear.folded import BlockShockFolded
from blockshock.linear.masked_split import MaskedSplit
from blockshock.linear.trainers import ignore_in_ddp

__all__ = ["METHODS", "ignore_in_ddp"]

_CLASSES = DenseSingle, DenseTPRow, DenseTPColumn, MaskedSplit, BlockShock, BlockShockFolded
METHODS = {cls.method: cls for cls in _CLASSES}
