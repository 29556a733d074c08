"""How ranks begin: with tensors that can be wrapped, and rank 0's values in them."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockshock.data_parallel.buckets import cut
from blockshock.distributed import collectives
from blockshock.linear.part import PartWeight, replicas

_CHUNK = 1 << 26  # bytes of one broadcast, for which a copy is made


def problem_of(tensors: dict[str, Tensor], group=None, *, alone: bool, parts: bool) -> str | None:
    """Why a method cannot wrap a module with these tensors, or None.

    alone: on one rank. parts: whether it takes parts of weights of which this rank alone of the
    group holds others.
    """
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        names = ", ".join(sorted(map(str, devices)))
        return f"the module is on {names}; move it to the one device of this rank first"
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            return f"{name!r} has no shape yet; run a batch through the module first"
        if alone or type(tensor) in (Tensor, nn.Parameter, nn.Buffer):
            continue
        said = f"{name!r} is a {type(tensor).__name__}, of which other ranks may hold another part"
        if not (isinstance(tensor, PartWeight) and tensor.values_only):
            return f"{said}; use DistributedDataParallel over the ranks that hold the same part"
        if not replicas(tensor, group):
            return f"{said}; give group= the ranks that hold the same part"
        if not parts:
            return f"{said}, and this method would shard it again; use 'overlapped'"
    return None


def described(tensor: Tensor) -> str:
    """What ranks must have in common of a tensor: shape, dtype, part, whether it is trained."""
    kind = str(tensor.dtype).removeprefix("torch.")
    lazy = isinstance(tensor, nn.parameter.UninitializedTensorMixin)
    text = f"{'no shape' if lazy else list(tensor.shape)} {kind}"
    if isinstance(tensor, PartWeight):
        ranks = collectives.group_size(tensor.group)
        text += f", part {collectives.group_rank(tensor.group)} of {ranks}"
    return text + (", trained" if tensor.requires_grad else "")


@torch.no_grad()
def broadcast(tensors: list[Tensor], group) -> None:
    """Gives all ranks rank 0's values; many tensors of one dtype travel as one."""
    for part in cut(tensors, _CHUNK):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in part])
        if flat.numel():
            dist.broadcast(flat.view(torch.uint8), group_src=0, group=group)
        for tensor, values in zip(part, flat.split([t.numel() for t in part]), strict=True):
            tensor.detach().copy_(values.view(tensor.shape))
