"""The stream of a group of ranks: how a rank enters what all hold, and how the ranks leave it.

    enter(x) = x            dx = Σ_r dx_r     each rank goes on with x by itself
    leave(D_r) = Σ_r D_r    dD_r = dx         all ranks have the same again
    once(x) = x             dx = dx_0         all ranks compute the same from an entered x

`enter` and `leave` are f and g of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
Where all ranks compute the same from an entered x, the gradient would be summed R times: `once`
counts that of the first rank alone. So whatever leaves `enter` has the same bits on every rank,
even where the kernels of two ranks add in another order.

Nobody scales anything: a loss that all ranks compute counts once.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blockshock import tuning
from blockshock.distributed import collectives
from blockshock.distributed import reduce as ways
from blockshock.distributed.groups import ByGroup
from blockshock.distributed.reduce import Plan


class Sums:
    """Sums over a group of ranks, by a way of `distributed.reduce.SUMS`, forward and backward.

    group: None for the default one, or a process alone. Under "auto" the first use of a size is
    measured, a collective; inside a graph's capture it is the backend's all-reduce.

    Raises:
        ValueError: an unknown way.
    """

    def __init__(self, group=None, reduce: str = "collective"):
        if reduce not in ways.SUMS:
            raise ValueError(f"unknown sum {reduce!r}; use one of {', '.join(ways.SUMS)}")
        self.group, self.reduce = group, reduce
        self.ranks, self.rank = collectives.group_size(group), collectives.group_rank(group)

    @torch.compiler.disable(reason="collectives run between compiled computations")
    def enter(self, x: Tensor) -> Tensor:
        """x, alike on all ranks; its gradient is the sum of the ranks'."""
        return x if self.ranks == 1 else _Enter.apply(x, self)

    @torch.compiler.disable(reason="collectives run between compiled computations")
    def leave(self, partial: Tensor) -> Tensor:
        """Σ_r partial, the same bits on all ranks. It takes the place of `partial` in memory."""
        if self.ranks == 1:
            return partial
        # Sums use streams and buffers of the current device; autograd sets it in a backward.
        with torch.cuda.device_of(partial):
            return _Leave.apply(collectives.fix_layout(partial), self)

    def once(self, x: Tensor) -> Tensor:
        """x, of which all ranks compute the same; its gradient is the first rank's, then zero."""
        return x if self.ranks == 1 else _Once.apply(x, self.rank)

    def gather(self, part: Tensor) -> Tensor:
        """[...] -> [ranks, ...], of which all ranks compute the same; dpart is this rank's."""
        return part[None] if self.ranks == 1 else _Gather.apply(part, self)

    def __deepcopy__(self, memo: dict) -> "Sums":
        """In the same process group, which has no copies."""
        return self

    def plan(self, partial: Tensor) -> Plan:
        """How a tensor [..., columns] is summed."""
        rows, columns = partial.numel() // max(1, partial.shape[-1]), partial.shape[-1]
        if self.reduce == "collective" or partial.dim() < 2 or rows == 0:
            return Plan("collective")
        question = (
            f"sum of a stream: N={columns} B={rows} {str(partial.dtype).removeprefix('torch.')} "
            f"ranks={self.ranks}, reduce={self.reduce}{'' if partial.is_cuda else ', no GPU'}"
        )
        return _chosen(self, question, partial)

    def total(self, partial: Tensor, plan: Plan) -> Tensor:
        """Σ_r of a contiguous tensor; a collective overwrites it."""
        if plan.how == "collective":
            return collectives.all_reduce(partial, self.group)
        rows = partial.view(-1, partial.shape[-1])
        return ways.begin_sum(_itself, rows, plan, self.group).wait().view_as(partial)


_plans = ByGroup(dict)  # of a group, by question: {name: Plan}


def _chosen(sums: Sums, question: str, partial: Tensor) -> Plan:
    by_name, answer = _plans.of(sums.group).get(question), tuning.known(question, sums.group)
    if by_name and (answer or len(by_name) == 1):
        return by_name[answer.name if answer else next(iter(by_name))]
    if partial.is_cuda and torch.cuda.is_current_stream_capturing():
        if sums.reduce != "auto":
            raise RuntimeError(
                f"{question}: this sum was not used yet and a graph is being captured; run this "
                "shape once before the capture"
            )
        return Plan("collective")
    columns = partial.shape[-1]
    size = partial.numel() // columns, columns, partial.dtype, partial.device
    found = ways.plans(sums.reduce, *size, sums.group, hide=True)
    by_name = {str(plan): plan for plan in found}
    tuning.hold(_plans.of(sums.group), question, by_name)
    if len(by_name) == 1:
        return found[0]
    trial = torch.zeros_like(partial, memory_format=torch.contiguous_format).detach()
    steps = {name: _step(sums, trial, plan) for name, plan in by_name.items()}
    return by_name[tuning.pick(question, {"": steps}, partial.device, sums.group).name]


def _step(sums: Sums, trial: Tensor, plan: Plan):
    return lambda: sums.total(trial, plan)


def _itself(x: Tensor) -> Tensor:
    return x


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sums):
        ctx.sums = sums
        return x.view_as(x)

    @staticmethod
    @once_differentiable  # a second derivative would not see the sum
    def backward(ctx, dx):
        # A copy: autograd may have given the same tensor to others.
        dx = dx.clone(memory_format=torch.contiguous_format)
        return ctx.sums.total(dx, ctx.sums.plan(dx)), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, sums):
        plan = sums.plan(partial)
        if plan.how == "collective":
            ctx.mark_dirty(partial)
        return sums.total(partial, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        return dx, None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rank):
        ctx.rank = rank
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return (dx if ctx.rank == 0 else None), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, sums):
        ctx.rank = sums.rank
        return collectives.all_gather(part, sums.group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gathered):
        return gathered[ctx.rank], None
