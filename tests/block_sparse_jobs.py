"""What the ranks do in the tests of block-sparse layers."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from blockshock import data_parallel
from blockshock.block_sparse import sparsify
from blockshock.distributed import collectives
from blockshock.distributed.ranks import device


def wrapped(storage, wrapper, same):
    """What wrapping a model says, and whether one step then left all ranks the same weights.

    same: whether the ranks had the same weights before it was made sparse.
    """
    torch.manual_seed(0 if same else collectives.group_rank())
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    model = nn.Sequential(nn.Linear(64, 128, device=device(), dtype=dtype))
    model.append(nn.GELU())
    sparsify(model, storage=storage, block=16, sparsity=0.5)
    wrap = DistributedDataParallel if wrapper == "ddp" else data_parallel.METHODS[wrapper]
    try:
        outer = wrap(model)
    except ValueError as error:
        return str(error)
    torch.manual_seed(collectives.group_rank())
    outer(torch.randn(8, 64, device=device(), dtype=dtype)).sum().backward()
    if wrapper != "ddp":
        outer.finish_gradient_sync()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    dense = model[0].to_dense()
    return bool((collectives.all_gather(dense) == dense).all())
