"""Linear layers that keep whole tiles of their weight, and how they learn which.

    apply_supermask(model, linear=Settings(block=64, sparsity=0.8))   train: scores choose the tiles
    fold(model)                                                       ordinary layers, with zeros
    sparsify(model, block=64)                                         the kept tiles alone

A method of `METHODS` is an `nn.Module` of Y = act(X Wᵀ + b), with, besides `forward`,

    method                              its name
    from_dense(weight, bias=None, *, block, sparsity or mask, activation)
    unsupported(N, K, *, dtype, device_type, block, sparsity, activation)
                                        why it cannot run, or None
    to_dense()                          the dense [N, K]
    restrict(source)                    what its parameter would be for another dense [N, K]
    cost(batch)                         arithmetic and bytes of one product
    policies                            ways to train it; the first is the usual one
"""

from blockshock.block_sparse import alike  # noqa: F401  compares the masks of wrapped models
from blockshock.block_sparse.convert import sparsify
from blockshock.block_sparse.linear import BlockSparseLinear
from blockshock.block_sparse.model import apply_supermask, fold, set_sparsity, supermasks
from blockshock.block_sparse.peers import Dense, TorchBSR
from blockshock.block_sparse.schedule import cubic
from blockshock.block_sparse.semi_structured import SemiStructured
from blockshock.block_sparse.supermask import Settings, SupermaskConv2d, SupermaskLinear

__all__ = [
    "METHODS",
    "BlockSparseLinear",
    "Settings",
    "SupermaskConv2d",
    "SupermaskLinear",
    "apply_supermask",
    "cubic",
    "fold",
    "set_sparsity",
    "sparsify",
    "supermasks",
]

METHODS = {cls.method: cls for cls in (Dense, TorchBSR, BlockSparseLinear, SemiStructured)}
