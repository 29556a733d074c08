"""Parameters, gradients and optimizer state sharded: rank r holds 1/R of each (ZeRO-3).

    forward of a block    w = gather(share);  y = f(x, w);  w is freed
    its backward          w = gather(share);  dx, dw;  w is freed;  share.grad += reduce(dw)

The next block's parameters are gathered while one computes, and its gradients are reduced while the
next one's are computed; the order is that of the last forward. Sources: ZeRO (arXiv:1910.02054),
stage 3; PyTorch FSDP (arXiv:2304.11277), whose memory of gathered parameters, emptied and filled
again under the tensors that autograd has saved, is used here too.
"""

from functools import reduce

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from blockshock.data_parallel import buckets
from blockshock.data_parallel.elementwise import check_elementwise
from blockshock.data_parallel.schedule import Schedule
from blockshock.data_parallel.shards import Flat, Wire
from blockshock.data_parallel.units import units_of
from blockshock.data_parallel.wrapper import Wrapper
from blockshock.distributed import collectives
from blockshock.linear.part import PartGradient


class FullySharded(Wrapper):
    """Each rank holds a share of each parameter, of its gradient and of its optimizer state.

    module, group: as in `Wrapper`. The units that are gathered together are the elements of the
    ModuleList that holds most parameters, and the module with all the rest. All ranks must run the
    same units in the same order, by calling the modules.

    Outside of forward and backward a parameter of `.module` is this rank's share of it: the same
    object under the same name, 1-D, possibly empty, in the dtype that it had. Inside, modules have
    whole parameters in the compute dtype. Hooks on parameters' gradients are not called.

    unused: "error", or "zero" for the gradients of parameters that no backward of a step used.
    compute_dtype: bfloat16, for example: the dtype of gathered floating-point parameters, of their
        gradients until they are reduced, and of the module's floating-point inputs, which are cast.
        Buffers keep theirs. None: the parameters' own.
    reshard_after_forward: free a block's parameters after its forward, and gather them again for
        its backward. The gradient must then enter a block by what its forward returns. The block
        that ran last and the root keep theirs until their backward, and so does a block that
        returns anything but tensors and plain values in tuples, lists and dicts.

    Inside `no_sync` each backward is reduced all the same: no rank ever holds a whole gradient.
    Gradients know that they are shares: a norm of them, in `torch.nn.utils.clip_grad_norm_` for
    example, and the inf check of a `GradScaler` are those of the whole gradient, on every rank.

    Raises ValueError as `Wrapper` does; RuntimeError in forward where a parameter was moved, cast,
    frozen or unfrozen after it was sharded.
    """

    method = "fully_sharded"
    takes_parts = False

    def __init__(
        self,
        module: nn.Module,
        *,
        group=None,
        unused: str = "error",
        compute_dtype: torch.dtype | None = None,
        reshard_after_forward: bool = True,
    ):
        super().__init__(
            module,
            group,
            unused=unused,
            compute_dtype=compute_dtype,
            reshard_after_forward=reshard_after_forward,
        )
        self._unused = unused
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._wire = Wire(group, device)
        units = units_of(module, compute_dtype, self._wire)
        self._schedule = Schedule(units, self._wire, compute_dtype, reshard_after_forward)
        flats = [flat for unit in units for flat in unit.flats]
        place = {p: (flat, i) for flat in flats for i, p in enumerate(flat.params)}
        every = module.named_parameters(remove_duplicate=False)
        self._place: dict[str, tuple[Flat, int]] = {name: place[p] for name, p in every}

    @staticmethod
    def unsupported(
        *,
        device_type: str,
        ranks: int,
        unused: str = "error",
        compute_dtype: torch.dtype | None = None,
        reshard_after_forward: bool = True,
    ) -> str | None:
        """None, or why it cannot run: value, rule, fix."""
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            return f"compute_dtype = {compute_dtype}: use a floating dtype, such as torch.bfloat16"
        if compute_dtype == torch.float16:
            return (
                "compute_dtype = torch.float16: its loss scale would be each rank's own; use "
                "torch.bfloat16, which needs none"
            )
        return buckets.unsupported(unused=unused)

    @staticmethod
    def refusal(module: nn.Module) -> str | None:
        """Why a module cannot be sharded, or None."""
        for name, part in module.named_modules():
            if Schedule.runs(part):
                return f"module {name!r} is sharded already; wrap a module once"
            if isinstance(part, nn.RNNBase):
                return (
                    f"module {name!r}, of class {type(part).__name__}, has a list of its weights; "
                    "leave it out of the wrapped module, or use a method that shards nothing"
                )
            if isinstance(part, nn.Embedding | nn.EmbeddingBag):
                if part.sparse:
                    return f"module {name!r} has sparse gradients; make it with sparse=False"
                if part.max_norm is not None:
                    return f"module {name!r} overwrites its weight; make it with max_norm=None"
        for name, p in module.named_parameters():
            if not p.ndim:
                return f"parameter {name!r} has no dimension to shard; give it the shape [1]"
        return None

    def finish_gradient_sync(self) -> None:
        """After the last backward of a step, on every rank: the shares' gradients are the mean.

        The current stream waits, and not the host. Raises RuntimeError inside `no_sync`, without a
        backward since the last call and, unless unused="zero", where no backward since then gave a
        parameter a gradient.
        """
        super().finish_gradient_sync()
        made = not self._schedule.finished
        used, trained = self._schedule.finish(), self.trained()
        missing = [name for name, p in trained.items() if p not in used]
        if missing and not made:
            raise RuntimeError(buckets.NO_BACKWARD)
        if missing and self._unused == "error":
            raise RuntimeError(buckets.no_gradient(missing))
        for name in missing:
            if trained[name].grad is None:
                zeros = torch.zeros_like(trained[name]).detach()
                trained[name].grad = PartGradient.of(zeros, self.group)

    @property
    def begun(self) -> bool:
        """Whether gradients were made since the last `finish_gradient_sync`."""
        return not self._schedule.finished

    def optimizer(self, cls, groups: list[dict] | None = None, **defaults) -> torch.optim.Optimizer:
        """As in `Wrapper`, over the shares.

        cls: a class of torch.optim whose step is elementwise, or another that says so:
        `elementwise = True`; else ValueError.
        """
        check_elementwise(cls, self.method)
        return super().optimizer(cls, groups, **defaults)

    def check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """As in `Wrapper`; ValueError for a class that `optimizer` would not take."""
        check_elementwise(type(optimizer), self.method)
        super().check_step(optimizer)
        # Not every fused step counts as a write by itself.
        increment_version(list(self.trained().values()))

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As in `Wrapper`: the norm is that of the whole gradient, over the shares of all ranks."""
        shares = [p for p in self.trained().values() if p.grad is not None]
        kind = reduce(torch.promote_types, (p.dtype for p in shares), torch.float32)
        square = torch.zeros((), dtype=kind, device=self._wire.device)
        if shares:
            with torch._C.DisableTorchFunctionSubclass():  # of this rank's shares, in one launch
                norms = torch._foreach_norm([p.grad for p in shares], 2, kind)
            square = torch.stack(norms).square().sum()
        norm = collectives.all_reduce(square, self.group).sqrt()
        nn.utils.clip_grads_with_norm_(shares, max_norm, norm)
        return norm

    def load_full_state_dict(self, state: dict[str, Tensor]) -> None:
        """As in `Wrapper`. Raises ValueError for a parameter of another shape."""
        for name, (flat, i) in self._place.items():
            if name in state and state[name].shape != flat.shapes[i]:
                raise ValueError(
                    f"the saved {name!r} has shape {list(state[name].shape)}, the model's has "
                    f"{list(flat.shapes[i])}; load into the same model"
                )
        super().load_full_state_dict({name: self.share(name, v) for name, v in state.items()})

    def whole(self, name: str, value, *, cpu: bool = False):
        """Gathers what has a share's shape. A collective, for parameters."""
        if isinstance(value, Tensor) and name in self._place:
            flat, i = self._place[name]
            if value.shape == flat.params[i].shape:
                value = flat.whole(i, value)
        return super().whole(name, value, cpu=cpu)

    def share(self, name: str, value):
        """Cuts this rank's share out of what has the parameter's shape."""
        if isinstance(value, Tensor) and name in self._place:
            flat, i = self._place[name]
            if value.shape == flat.shapes[i]:
                value = flat.cut(i, value)
        return super().share(name, value)
