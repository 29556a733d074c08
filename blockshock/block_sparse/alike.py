"""Ranks that train a sparse layer together must hold the same entries of its weight.

Data-parallel wrappers send rank 0's values to all ranks, and each rank would put them in the places
of its own mask. So the masks are compared where a model is put into DistributedDataParallel or into
a wrapper of `blockshock.data_parallel`, before anything is sent.
"""

import json
import zlib

import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from blockshock.block_sparse.linear import BlockSparseLinear
from blockshock.block_sparse.semi_structured import SemiStructured
from blockshock.data_parallel.wrapper import Wrapper
from blockshock.distributed import agree


def _check(outer: nn.Module, _: str, model: nn.Module) -> None:
    """Raises ValueError, on all ranks of the wrapper's group, where their masks differ."""
    if isinstance(outer, DistributedDataParallel):
        group = outer.process_group
    elif isinstance(outer, Wrapper) and not outer.alone:
        group = outer.group
    else:
        return
    sparse = (BlockSparseLinear, SemiStructured)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, sparse)}
    if not layers:
        return
    own = {name: _digest(layer) for name, layer in layers.items()}
    told = agree.told_by_all(json.dumps(own), group, about="wrapping a model of sparse layers")
    first = json.loads(told[0])
    for rank, text in enumerate(told):
        for name, digest in json.loads(text).items():
            if digest != first.get(name):
                raise ValueError(
                    f"rank {rank} of {dist.get_world_size(group)} holds other entries of the "
                    f"weight of layer {name!r} than rank 0; give all ranks the same weights before "
                    "they are made sparse"
                )


def _digest(layer: nn.Module) -> int:
    return zlib.crc32(layer.get_extra_state().cpu().numpy().tobytes())


register_module_module_registration_hook(_check)
