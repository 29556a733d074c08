"""Linear layers that keep whole tiles of their weight, and how they learn which.

apply_supermask(model, linear=Settings(block=64, sparsity=0.8)) lets the layers of a model learn
their tiles, and fold(model) makes them ordinary layers with zeros in what was dropped.
"""

from blockshock.block_sparse.model import apply_supermask, fold, set_sparsity, supermasks
from blockshock.block_sparse.schedule import cubic
from blockshock.block_sparse.supermask import Settings, SupermaskConv2d, SupermaskLinear

__all__ = [
    "Settings",
    "SupermaskConv2d",
    "SupermaskLinear",
    "apply_supermask",
    "cubic",
    "fold",
    "set_sparsity",
    "supermasks",
]
