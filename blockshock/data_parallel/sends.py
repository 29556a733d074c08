"""Collectives that are begun, and waited for when their result is needed."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from blockshock.distributed import collectives
from blockshock.measure.regions import region


def start_mean(tensor: Tensor, group=None) -> Callable[[], None]:
    """Begins tensor = the mean of the ranks' tensors, in place and the same bits on every rank.

    What is returned makes the current stream wait for it; on the CPU it waits itself.
    """
    op = _op(tensor, group)
    work = dist.all_reduce(tensor, op=op, group=group, async_op=True)
    return _finish("allreduce", work, op, tensor, tensor.nbytes, group)


def start_mean_of_share(tensor: Tensor, group=None) -> Callable[[], None]:
    """Begins the same for this rank's share alone: share r of R equal ones, in place.

    The rest of the tensor has no meaning afterwards.
    """
    op, share = _op(tensor, group), own_share(tensor, group)
    work = collectives.reduce_scatter_tensor(share, tensor, op=op, group=group, async_op=True)
    return _finish("reduce_scatter", work, op, share, tensor.nbytes, group)


def start_gather(tensor: Tensor, group=None) -> Callable[[], None]:
    """Begins to fill a flat tensor with the ranks' shares, each from its rank, in place."""
    own = own_share(tensor, group)
    work = collectives.all_gather_tensor(tensor, own, group=group, async_op=True)

    def finish():
        with region("allgather", bytes=tensor.nbytes):
            work.wait()

    return finish


def own_share(tensor: Tensor, group=None) -> Tensor:
    """This rank's share of a flat tensor whose length is a multiple of the ranks."""
    length = len(tensor) // collectives.group_size(group)
    return tensor.narrow(0, collectives.group_rank(group) * length, length)


def _op(tensor: Tensor, group):
    """NCCL divides in the sum's own kernel; gloo cannot."""
    averages = tensor.is_cuda and "nccl" in dist.get_backend(group)
    return dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM


def _finish(name: str, work, op, result: Tensor, size: int, group) -> Callable[[], None]:
    def finish():
        with region(name, bytes=size):
            work.wait()
            if op == dist.ReduceOp.SUM:
                result.div_(collectives.group_size(group))

    return finish
