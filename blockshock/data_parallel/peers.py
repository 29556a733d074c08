"""PyTorch's own: DistributedDataParallel and `fully_shard`.

torch_ddp    buckets are sent in the backward (Li et al., arXiv:2006.15704)
torch_fsdp   parameters, gradients and optimizer state are sharded (Zhao et al.,
             arXiv:2304.11277): each module of the longest ModuleList, then the rest
"""

from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from blockshock.data_parallel import buckets
from blockshock.data_parallel.wrapper import Wrapper

# torch 2.13 deprecates the one for the other; before it only the one was there.
_NAMES = signature(DistributedDataParallel).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"


class TorchDDP(Wrapper):
    """DistributedDataParallel, with gradients as views of its buckets.

    Its gradients are the mean once the backward ends: `finish_gradient_sync` has nothing to do.
    Buffers stay each rank's own, as in the other methods. Raises RuntimeError (PyTorch's) in the
    next forward where a parameter had no gradient.

    module, group: as in `Wrapper`. bucket_mib: the most MiB of a bucket.
    """

    method = "torch_ddp"

    def __init__(self, module, *, group=None, bucket_mib=25.0):
        super().__init__(module, group, bucket_mib=bucket_mib)
        ddp = DistributedDataParallel(
            module,
            process_group=group,
            bucket_cap_mb=bucket_mib,
            gradient_as_bucket_view=True,
            **{_BUFFERS: False},
        )
        self._ddp = [ddp]  # in a list: as a submodule it would name each parameter twice

    @staticmethod
    def unsupported(*, device_type, ranks, bucket_mib=25.0):
        """None, or why it cannot run: value, rule, fix."""
        return buckets.unsupported(bucket_mib)

    def forward(self, *args, **kwargs):
        return self._ddp[0](*args, **kwargs)

    def _send(self, sending: bool) -> None:
        super()._send(sending)
        self._ddp[0].require_backward_grad_sync = sending


class TorchFSDP(Wrapper):
    """`fully_shard` of each module in the longest ModuleList, then of what is left.

    Gradients are this rank's shards, as DTensors, and the mean once the backward ends.

    module, group: as in `Wrapper`. compute_dtype: the dtype of products and of gathered parameters,
    None for the parameters' own.
    """

    method = "torch_fsdp"
    takes_parts = False

    def __init__(self, module, *, group=None, compute_dtype: torch.dtype | None = None):
        super().__init__(module, group, compute_dtype=compute_dtype)
        kind = next(iter(module.parameters())).device.type
        mesh = DeviceMesh.from_group(group or dist.group.WORLD, kind)
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype)
        for part in (*_blocks(module), module):
            fully_shard(part, mesh=mesh, mp_policy=policy)

    @staticmethod
    def unsupported(*, device_type, ranks, compute_dtype=None):
        """None, or why it cannot run: value, rule, fix."""
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            return f"compute_dtype = {compute_dtype}: use a floating dtype, such as torch.bfloat16"
        return None

    def _send(self, sending: bool) -> None:
        super()._send(sending)
        self.module.set_requires_gradient_sync(sending)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        return super().clip_grad_norm_(max_norm).full_tensor()

    def load_full_state_dict(self, state: dict[str, Tensor]) -> None:
        own = self.module.state_dict()
        self.module.load_state_dict(
            {n: _sharded(v, own[n]) if n in own else v for n, v in state.items()}
        )

    def whole(self, name: str, value: Any, *, cpu: bool = False) -> Any:
        if isinstance(value, DTensor):
            value = value.detach().full_tensor()
        return super().whole(name, value, cpu=cpu)

    def share(self, name: str, value: Any) -> Any:
        parameter = self.trained()[name]
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
            return _sharded(value, parameter)
        return super().share(name, value)


def _blocks(module: nn.Module) -> list[nn.Module]:
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def _sharded(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as another is; every rank has it, so nothing is sent."""
    if not isinstance(like, DTensor):
        return value
    value = value.detach().to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
