"""ZeRO-1 (Rajbhandari et al., arXiv:1910.02054): each rank steps a share of every parameter bucket.

    values, gradients [n] of a bucket, alike on all ranks;  share r = [r n/R, (r+1) n/R)
    backward   each bucket's gradients are reduce-scattered once they are there: share r = the mean
    step       w_r = step(w_r, g_r)  with the optimizer's state of share r alone
    after it   values = all-gather of the w_r

A rank's share of a bucket is cut where its parameters begin, so a piece belongs to one parameter
and one group of the optimizer, whatever the groups are. A parameter has at most one piece on a
rank. Parameters are views of their bucket's values: nothing is copied before or after a collective.
"""

from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from blockshock.data_parallel import buckets
from blockshock.data_parallel.buckets import MIB, Bucket, Gradients
from blockshock.data_parallel.elementwise import PieceGradient, check_elementwise
from blockshock.data_parallel.groups import group_options
from blockshock.data_parallel.sends import own_share, start_gather, start_mean_of_share
from blockshock.data_parallel.wrapper import Wrapper
from blockshock.distributed import collectives
from blockshock.linear.part import PartWeight

_PIECES = (
    "each rank steps pieces of the parameters, and the parameters have no .grad; use the wrapper's "
    "optimizer(cls, ...) and clip_grad_norm_(max_norm)"
)


class Shares(Bucket):
    """A bucket of gradients, and one like it of the parameters' values, cut for the ranks.

    pieces: by name, what this rank steps: [entries], or a scalar where the parameter is one.
    """

    def __init__(self, named: dict[str, nn.Parameter], group=None):
        super().__init__(named, collectives.group_size(group))
        self.values = torch.zeros_like(self.buffer)
        self.bounds = {}  # by name: where its piece begins and ends in the buffer
        length = len(own_share(self.buffer, group))
        first = collectives.group_rank(group) * length
        for name, parameter, begin in zip(self.names, self.parameters, self.offsets, strict=True):
            start, stop = max(first, begin), min(first + length, begin + parameter.numel())
            if start < stop:
                self.bounds[name] = start, stop
        self.places = self.views_of(self.values)
        for parameter, place in zip(self.parameters, self.places, strict=True):
            place.copy_(parameter.detach())
            parameter.data = place
        self._at = [place.data_ptr() for place in self.places]
        self.pieces = {n: nn.Parameter(self.piece(n, self.values)) for n in self.bounds}
        gradients = {n: self.piece(n, self.buffer) for n in self.bounds}
        self._gradients = {n: g.as_subclass(PieceGradient) for n, g in gradients.items()}

    def piece(self, name: str, flat: Tensor) -> Tensor:
        """This rank's piece of a parameter in a buffer like this bucket's."""
        start, stop = self.bounds[name]
        piece = flat[start:stop]
        scalar = self.parameters[self.names.index(name)].dim() == 0
        return piece.view(()) if scalar else piece

    def check(self) -> None:
        super().check()
        for name, parameter, at in zip(self.names, self.parameters, self._at, strict=True):
            if parameter.data_ptr() != at:
                raise RuntimeError(
                    f"{name!r} was moved or cast after it was wrapped; do so before, or wrap again"
                )

    def hand_over(self) -> None:
        """Gives the pieces their gradients. The parameters' are this rank's no more: None."""
        for name, piece in self.pieces.items():
            piece.grad = self._gradients[name]
        for parameter in self.parameters:
            parameter.grad = None


class ShardedOptimizer(Wrapper):
    """Gradients as in `overlapped`, but each rank gets the mean of a share, and steps that share.

    `optimizer(cls, ...)` takes the classes of torch.optim whose step is elementwise, and others
    that say so: `elementwise = True`. Its `step` is a collective, so all ranks must make it or
    none: a GradScaler, which decides on each rank, is refused, and so are an optimizer that was
    made directly, and a norm of a piece's gradient. `finish_gradient_sync` ends an accumulation:
    the next backward begins from zero. module.parameters() have no .grad then.

    module, group: as in `Wrapper`. bucket_mib, unused: as in `replicated`.
    """

    method = "sharded_optimizer"

    def __init__(self, module, *, group=None, bucket_mib=25.0, unused="error"):
        super().__init__(module, group, bucket_mib=bucket_mib, unused=unused)
        self.gradients = Gradients(
            module,
            lambda bucket: start_mean_of_share(bucket.buffer, group),
            lambda named: Shares(named, group),
            most=bucket_mib * MIB,
            unused=unused,
            early=True,
        )
        self.stepped |= {id(piece) for piece in self.trained().values()}
        self._made = WeakSet()  # optimizers whose step ends with a gather

    @staticmethod
    def unsupported(*, device_type, ranks, bucket_mib=25.0, unused="error"):
        """None, or why it cannot run: value, rule, fix."""
        return buckets.unsupported(bucket_mib, unused)

    def finish_gradient_sync(self) -> None:
        super().finish_gradient_sync()
        for bucket in self.gradients.buckets:
            bucket.hand_over()

    def trained(self) -> dict[str, Tensor]:
        """By name, this rank's pieces of the parameters, in the order of `named_parameters`."""
        pieces = {n: p for bucket in self.gradients.buckets for n, p in bucket.pieces.items()}
        return {n: pieces[n] for n, _ in self.module.named_parameters() if n in pieces}

    def optimizer(self, cls, groups=None, **defaults):
        check_elementwise(cls, self.method)
        optimizer = super().optimizer(cls, groups, **defaults)
        optimizer.register_step_post_hook(lambda *_: self._gather())
        self._made.add(optimizer)
        return optimizer

    def check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """As in `Wrapper`; RuntimeError for an optimizer that `optimizer` has not made."""
        if optimizer not in self._made:
            raise RuntimeError(
                f"a {type(optimizer).__name__} that was made directly cannot step what is wrapped "
                f"by {self.method}: {_PIECES}"
            )
        super().check_step(optimizer)

    def parameters(self, recurse: bool = True):
        """Raises RuntimeError: what trainers ask them for would find no gradients."""
        raise RuntimeError(
            f"parameters() of a {self.method} wrapper: {_PIECES}; for the values alone, call "
            "module.parameters()"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.module.zero_grad(set_to_none)

    def _gather(self) -> None:
        """After a step: all ranks' shares of the parameters."""
        waits = [start_gather(bucket.values, self.group) for bucket in self.gradients.buckets]
        for bucket, wait in zip(self.gradients.buckets, waits, strict=True):
            wait()
            for parameter in bucket.parameters:
                torch.autograd.graph.increment_version(parameter)  # it was written by its pieces

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        pieces = {n: piece for n, piece in self.trained().items() if piece.grad is not None}
        parameters = dict(self.module.named_parameters())
        # A part's group may be None, the default one.
        held = {n: (p.group,) if isinstance(p, PartWeight) else () for n, p in parameters.items()}
        first = next(iter(parameters.values()))
        total = torch.zeros((), dtype=torch.float64, device=first.device)
        for group in dict.fromkeys(held.values()):
            own = [piece.grad for name, piece in pieces.items() if held[name] == group]
            with torch._C.DisableTorchFunctionSubclass():
                square = get_total_norm(own).to(first.device, torch.float64).square()
            dist.all_reduce(square, group=self.group)
            total += collectives.all_reduce(square, *group) if group else square
        norm = total.sqrt().to(torch.promote_types(first.dtype, torch.float32))
        clip_grads_with_norm_(list(pieces.values()), max_norm, norm)
        return norm

    def full_optimizer_state(self, optimizer, *, cpu: bool = False) -> dict:
        own = {}  # by name and key: the dtype of what is cut like the parameter, or the value
        for name, piece in self.trained().items():
            entries = optimizer.state.get(piece, {})
            if entries:
                own[name] = {key: _described(value, piece) for key, value in entries.items()}
        told = [None] * self.ranks
        dist.all_gather_object(told, own, group=self.group)
        known = {name: entries for each in told for name, entries in each.items()}
        state = {n: dict(known[n]) for n, _ in self.module.named_parameters() if n in known}
        for bucket in self.gradients.buckets:
            for key, dtype in _kinds(bucket, known):
                self._gather_state(bucket, key, dtype, optimizer, state, cpu)
        return {"groups": group_options(optimizer), "state": state}

    def _gather_state(self, bucket, key, dtype, optimizer, state, cpu) -> None:
        """Puts one kind of state of a bucket's parameters, whole, into `state`."""
        flat = torch.zeros_like(bucket.values, dtype=dtype)
        for name, piece in bucket.pieces.items():
            if state.get(name, {}).get(key) == dtype:
                bucket.piece(name, flat).copy_(optimizer.state[piece][key])
        start_gather(flat, self.group)()
        for name, view in zip(bucket.names, bucket.views_of(flat), strict=True):
            if state.get(name, {}).get(key) == dtype:
                state[name][key] = self.whole(name, view, cpu=cpu) if cpu else view.clone()

    def share(self, name: str, value):
        """A copy of this rank's piece of a tensor like parameter `name`; anything else whole."""
        bucket = next(each for each in self.gradients.buckets if name in each.names)
        place = bucket.names.index(name)
        parameter = bucket.parameters[place]
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            return super().share(name, value)
        start, stop = (bound - bucket.offsets[place] for bound in bucket.bounds[name])
        strided = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
        strided.detach().copy_(value)
        flat = strided.detach().as_strided((parameter.numel(),), (1,))
        return flat[start:stop].view(bucket.pieces[name].shape).clone()


def _described(value, piece: Tensor):
    if not isinstance(value, Tensor):
        return value
    return value.dtype if value.shape == piece.shape else value.detach().cpu()


def _kinds(bucket: Bucket, known: dict) -> list[tuple[str, torch.dtype]]:
    """The keys and dtypes of a bucket's state, in one order on all ranks."""
    entries = {
        (key, value)
        for name in bucket.names
        for key, value in known.get(name, {}).items()
        if isinstance(value, torch.dtype)
    }
    return sorted(entries, key=str)
