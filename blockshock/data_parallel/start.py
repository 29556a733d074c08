"""How ranks begin: with tensors that can be wrapped, and rank 0's values in them."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockshock.data_parallel.buckets import cut

_CHUNK = 1 << 26  # bytes of one broadcast, for which a copy is made


def problem_of(tensors: dict[str, Tensor], *, alone: bool) -> str | None:
    """Why no method can wrap a module with these tensors, or None. alone: on one rank."""
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        names = ", ".join(sorted(map(str, devices)))
        return f"the module is on {names}; move it to the one device of this rank first"
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            return f"{name!r} has no shape yet; run a batch through the module first"
        if not alone and type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            return (
                f"{name!r} is a {type(tensor).__name__}, of which other ranks may hold another "
                "part; use DistributedDataParallel over the ranks that hold the same part"
            )
    return None


@torch.no_grad()
def broadcast(tensors: list[Tensor], group) -> None:
    """Gives all ranks rank 0's values; many tensors of one dtype travel as one."""
    for part in cut(tensors, _CHUNK):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in part])
        if flat.numel():
            dist.broadcast(flat.view(torch.uint8), group_src=0, group=group)
        for tensor, values in zip(part, flat.split([t.numel() for t in part]), strict=True):
            tensor.detach().copy_(values.view(tensor.shape))
