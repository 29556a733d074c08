"""When the units of a sharded module are gathered, freed and reduced: hooks around their passes.

    enter forward    this unit is gathered, if it was not ahead; the next one begins to be gathered
    leave forward    it is freed
    enter backward   a gradient has reached its outputs: gathered again; so begins the one before
    leave backward   all gradients of its inputs and parameters are there: freed, and reduced

"Next" and "before" are those of the last forward. A forward inside a backward is that of a
checkpoint, computed again; it does not change the order.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from blockshock.data_parallel.shards import Wire
from blockshock.data_parallel.units import Call, Unit

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Schedule:
    """Runs the units of a module; the first is the root's.

    compute_dtype: of the root's floating-point inputs, if not None. reshard: see `FullySharded`.
    """

    def __init__(self, units: list[Unit], wire: Wire, compute_dtype, reshard: bool):
        self.units, self._wire = units, wire
        self._root, self._compute_dtype, self._reshard = units[0], compute_dtype, reshard
        self.used: set[nn.Parameter] = set()  # those that had gradients since the last `finish`
        self.finished = True
        # The order of the last forward: what ran after a unit, what before it, and what ran last.
        self._after: dict[Unit, Unit] = {}
        self._before: dict[Unit, Unit] = {}
        self._last: Unit | None = None
        self._latest: Unit | None = None  # in the forward that runs at this moment
        for unit in units:
            enter, leave = partial(self._enter_forward, unit), partial(self._leave_forward, unit)
            unit.module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            unit.module.register_forward_hook(leave, always_call=True, with_kwargs=True)

    @staticmethod
    def runs(module: nn.Module) -> bool:
        """Whether a module is a unit of some schedule."""
        hooks = (getattr(hook, "func", None) for hook in module._forward_pre_hooks.values())
        return any(isinstance(getattr(hook, "__self__", None), Schedule) for hook in hooks)

    def finish(self) -> set[nn.Parameter]:
        """The computation waits for the last reduction. Returns the parameters with gradients."""
        self._wire.settle()
        self._reset()
        used, self.used, self.finished = self.used, set(), True
        return used

    @torch.compiler.disable
    def _enter_forward(self, unit: Unit, module, args: tuple, kwargs: dict):
        again = _inside_backward()
        if unit is self._root and not again:
            for each in self.units:
                each.check()
            self._reset()
        call = Call(unit)
        unit.stack.append(call)
        unit.enter(call)
        if not again:
            self._gather_next(unit)
        leaves, spec = tree_flatten((args, kwargs))
        if unit is self._root and self._compute_dtype is not None:
            leaves = [self._cast(leaf) for leaf in leaves]
        inputs = [i for i, leaf in enumerate(leaves) if _has_gradient(leaf)]
        trained = []
        if torch.is_grad_enabled() and (inputs or unit.trained):
            call.has_graph, call.versions = True, unit.versions()
            given = (leaves[i] for i in inputs)
            entered = _Enter.apply(self, call, len(inputs), *given, *unit.trained)
            for place, i in enumerate(inputs):
                leaves[i] = entered[place]
            trained = entered[len(inputs) :]
        unit.show(unit.whole(trained))
        return tree_unflatten(leaves, spec)

    @torch.compiler.disable
    def _leave_forward(self, unit: Unit, module, args: tuple, kwargs: dict, result) -> None:
        if not unit.stack:  # it was never entered: an error came before
            return
        call = unit.stack.pop()
        unit.show_as_before()
        leaves = tree_leaves(result)  # after an error: of None
        outputs = [leaf for leaf in leaves if _has_gradient(leaf)]
        # In an object that is no tree there may be outputs that no hook can be given.
        opaque = not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves)
        if call.has_graph:
            given = [leaf._base for leaf in tree_leaves((args, kwargs)) if _has_gradient(leaf)]
            # A view that is written in place gets a new history; what it is a view of keeps it.
            bases = [leaf._base for leaf in outputs if not _any_is(leaf._base, given)]
            for tensor in filter(_has_gradient, [*outputs, *bases]):
                tensor.register_hook(partial(self._enter_backward, call))
        kept = opaque or not self._reshard or unit in (self._root, self._last)
        if not (call.has_graph and kept and (outputs or opaque)):
            unit.leave(call)
        if unit is self._root and not _inside_backward():
            self._last, self._latest = self._latest, None
            for each in self.units:  # what was gathered ahead, and did not run this time
                each.free_unless_needed()

    @torch.compiler.disable
    def _enter_backward(self, call: Call, gradient: Tensor) -> None:
        if call.in_backward:
            return
        unit, call.in_backward = call.unit, True
        if call not in unit.calls:  # what was freed comes from the shares again
            unit.check_versions(call.versions)
        unit.enter(call)
        call.full = unit.detached()
        unit.show(call.full)
        before = self._last if unit is self._root else self._before.get(unit)
        if before is not None:
            before.gather()

    def leave_backward(self, call: Call, gradients: tuple[Tensor | None, ...], wanted: bool):
        """gradients: of the unit's trained parameters. wanted: by this backward at all."""
        unit, found = call.unit, list(gradients)
        if call.full is not None:  # a checkpoint inside the unit may have run a backward of its own
            leaves = (f for f, p in zip(call.full, unit.params, strict=True) if p.requires_grad)
            found = [_sum(g, leaf.grad) for g, leaf in zip(found, leaves, strict=True)]
        call.in_backward, call.full = False, None
        unit.show_as_before()
        unit.leave(call)
        if wanted:
            self.finished = False
            self.used.update(p for p, g in zip(unit.trained, found, strict=True) if g is not None)
            unit.reduce(found)

    def _gather_next(self, unit: Unit) -> None:
        if self._latest is not None:
            self._after[self._latest], self._before[unit] = unit, self._latest
        self._latest = unit
        if unit in self._after:
            self._after[unit].gather()

    def _cast(self, leaf):
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(self._compute_dtype) if floating else leaf

    def _reset(self) -> None:
        self._latest = None
        for unit in self.units:
            unit.reset()


class _Enter(torch.autograd.Function):
    """A unit's inputs as they are, and its whole trained parameters; all of them in one node.

    So its backward comes when that of all the unit is done.
    """

    @staticmethod
    def forward(ctx, schedule: Schedule, call: Call, inputs: int, *tensors: Tensor):
        ctx.schedule, ctx.call, ctx.inputs = schedule, call, inputs
        ctx.set_materialize_grads(False)
        return *tensors[:inputs], *call.unit.trained_views()

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor | None):
        if any(map(_has_gradient, gradients)):
            raise RuntimeError(
                "a gradient has a graph of its own, and gradients of shares have none; call "
                "backward without create_graph"
            )
        given, found = gradients[: ctx.inputs], gradients[ctx.inputs :]
        shares = [node for node, _ in ctx.next_functions[ctx.inputs :]]
        ctx.schedule.leave_backward(ctx.call, found, any(map(_runs, shares)))
        return None, None, None, *given, *[None] * len(found)


def _runs(accumulate) -> bool:
    """Whether this backward asks for the gradient of a parameter, and not of inputs alone."""
    try:
        return torch._C._will_engine_execute_node(accumulate)
    except RuntimeError as error:  # torch's own answer for a leaf in autograd.grad
        raise RuntimeError(
            "torch.autograd.grad was asked for the gradient of a sharded parameter; call "
            "backward(), which adds it to .grad"
        ) from error


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _has_gradient(leaf) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _any_is(one: Tensor | None, others: list[Tensor]) -> bool:
    return any(one is other for other in others)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other
