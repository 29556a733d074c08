"""What every data-parallel method is: a wrapper around a module that all ranks hold alike.

    rank r:  g_r = ∂L(x_r; w)/∂w        finish_gradient_sync():  w.grad = 1/R Σ_r g_r

    for x, y in batches:
        loss(model(x), y).backward()
        model.finish_gradient_sync()
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

Several backwards make one step where all but the last are inside `model.no_sync()`.
"""

import json
from contextlib import contextmanager
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from blockshock.data_parallel.buckets import Gradients
from blockshock.data_parallel.groups import by_name, group_options, steps_of
from blockshock.data_parallel.start import broadcast, described, problem_of
from blockshock.distributed import collectives
from blockshock.distributed.agree import told_by_all

_wrappers: WeakSet["Wrapper"] = WeakSet()  # whose parameters optimizers may step


class Wrapper(nn.Module):
    """Base of the methods: starts all ranks from rank 0's parameters and buffers.

    module: on one device, alike on all ranks of the group (None: the default group). Its parameters
    and buffers become rank 0's; later the buffers are each rank's own. options: what else the
    ranks must have in common.

    Raises ValueError, on all ranks, where names, shapes, dtypes or requires_grad differ over them,
    or one of them cannot be wrapped.
    """

    method: str
    alone = False  # whether a rank has nothing to do with the others
    takes_parts = True  # whether parameters may be parts of weights that other groups hold
    gradients: Gradients | None = None  # those that hooks follow

    def __init__(self, module: nn.Module, group=None, **options):
        super().__init__()
        self.group, self.sending = group, True
        if not self.alone and not dist.is_initialized():
            raise ValueError(
                f"{self.method} needs a process group; call dist.init_process_group, or use 'none'"
            )
        self.ranks = 1 if self.alone else collectives.group_size(group)
        self.rank = 0 if self.alone else collectives.group_rank(group)
        _agree(self, module, options)
        self.module = module
        if self.ranks > 1:
            broadcast([*module.parameters(), *module.buffers()], group)
        # By id: a method may put other parameters in the place of these, which then must go.
        self.stepped = {id(p) for p in module.parameters() if p.requires_grad}
        _wrappers.add(self)

    @staticmethod
    def unsupported(*, device_type: str, ranks: int, **options) -> str | None:
        """None, or why it cannot run: value, rule, fix."""
        return None

    @staticmethod
    def refusal(module: nn.Module) -> str | None:
        """None, or why this module cannot be wrapped: value, rule, fix."""
        return None

    def forward(self, *args, **kwargs):
        """The module's."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self):
        """Gradients stay local; those of the next backward outside are sent with them, as a sum."""
        before = self.sending
        self._send(False)
        try:
            yield
        finally:
            self._send(before)

    def _send(self, sending: bool) -> None:
        self.sending = sending
        if self.gradients is not None:
            self.gradients.sending = sending

    def finish_gradient_sync(self) -> None:
        """After the last backward of a step, on every rank: gradients are now the mean over ranks.

        Where the optimizer's state is sharded, so are the gradients. The current stream waits, and
        not the host. Raises RuntimeError inside `no_sync`, and what `Gradients.finish` raises.
        """
        if not self.sending:
            raise RuntimeError("finish_gradient_sync() inside no_sync(); call it after the block")
        if self.gradients is not None:
            self.gradients.finish()

    def __getstate__(self):
        raise TypeError(
            f"a {self.method} wrapper cannot be copied or pickled: its hooks stay with its own "
            "parameters; copy its .module, or save full_state_dict()"
        )

    def trained(self) -> dict[str, Tensor]:
        """By the module's name of a parameter: what this rank's optimizer steps of it.

        Frozen parameters are left out, and so is what has no entry on this rank.
        """
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def optimizer(self, cls, groups: list[dict] | None = None, **defaults) -> torch.optim.Optimizer:
        """An optimizer of class `cls` over the parameters of the module that are not frozen.

        groups: [{"names": [of the module's parameters], **options}, ...]; what they do not name
        makes a last group, which has the defaults. Its `step` raises what `check_step` does.

        Raises ValueError for a name that is unknown or in two groups.
        """
        local, made = self.trained(), []
        for names, options in by_name(self.module, groups or []):
            made.append({"params": [local[n] for n in names if n in local], "names": names})
            made[-1].update(options)
        return cls(made, **defaults)

    @property
    def begun(self) -> bool:
        """Whether gradients were made since the last `finish_gradient_sync`."""
        return self.gradients is not None and self.gradients.begun

    def check_step(self, optimizer: Optimizer) -> None:
        """Before a step of any optimizer over its parameters, made by `optimizer` or directly.

        Raises RuntimeError if gradients were made since the last `finish_gradient_sync`.
        """
        if self.begun:
            raise RuntimeError(
                "gradients were made and not sent; call finish_gradient_sync() before step()"
            )

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients so that the norm of all of them is at most max_norm.

        After `finish_gradient_sync`. Returns the 2-norm before, a scalar, of the whole gradient
        over all ranks, also those that hold other parts of weights.
        """
        return nn.utils.clip_grad_norm_(list(self.trained().values()), max_norm)

    def full_state_dict(self, *, cpu: bool = False) -> dict[str, Tensor]:
        """The module's whole state_dict, by its own names, on every rank. A collective.

        cpu: copies in CPU memory; else tensors that may be the module's own.
        """
        state = self.module.state_dict()
        return {name: self.whole(name, value, cpu=cpu) for name, value in state.items()}

    def load_full_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads what `full_state_dict` of any method gave; the same on every rank."""
        self.module.load_state_dict(state)

    def full_optimizer_state(self, optimizer, *, cpu: bool = False) -> dict:
        """{"groups": [{"names": [...], **options}], "state": {name: {key: value}}}. A collective.

        Whole tensors by the parameters' names: no method and no number of ranks shows in it.
        cpu: as in `full_state_dict`.
        """
        state = {}
        for name, tensor in steps_of(optimizer, self.trained()):
            if tensor in optimizer.state:
                entries = optimizer.state[tensor].items()
                state[name] = {key: self.whole(name, value, cpu=cpu) for key, value in entries}
        return {"groups": group_options(optimizer), "state": state}

    def load_full_optimizer_state(self, optimizer, state: dict) -> None:
        """Loads what `full_optimizer_state` of any method gave; the same on every rank.

        The values are copied. Raises ValueError where its groups have other parameters.
        """
        own = [group["names"] for group in optimizer.param_groups]
        saved = [group["names"] for group in state["groups"]]
        if list(map(sorted, own)) != list(map(sorted, saved)):
            raise ValueError(
                f"the saved optimizer has groups of {list(map(len, saved))} parameters, this one "
                f"of {list(map(len, own))}, or with other names; make it with the same groups"
            )
        places = enumerate(steps_of(optimizer, self.trained()))
        numbered = {
            place: {key: self.share(name, value) for key, value in state["state"][name].items()}
            for place, (name, _) in places
            if name in state["state"]
        }
        start, groups = 0, []
        for group, names, options in zip(optimizer.param_groups, own, state["groups"], strict=True):
            stop = start + len(group["params"])
            groups.append({**options, "names": names, "params": list(range(start, stop))})
            start = stop
        optimizer.load_state_dict({"state": numbered, "param_groups": groups})

    def whole(self, name: str, value, *, cpu: bool = False):
        """A tensor of the state of parameter or buffer `name`, whole; anything else as it is."""
        if isinstance(value, Tensor) and cpu:
            return value.detach().to("cpu", copy=True)
        return value

    def share(self, name: str, value):
        """A copy of what this rank holds of a whole tensor of the state of parameter `name`."""
        return value.detach().clone() if isinstance(value, Tensor) else value


def _check_step(optimizer: Optimizer, args, kwargs) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for wrapper in _wrappers:
        if not stepped.isdisjoint(wrapper.stepped):
            wrapper.check_step(optimizer)


def _agree(wrapper: Wrapper, module: nn.Module, options: dict) -> None:
    """Raises ValueError on all ranks where one cannot wrap its module, or they are not alike."""
    facts = {"the method": wrapper.method, **{f"option {k}": str(v) for k, v in options.items()}}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        facts[name] = described(tensor)
    devices = {tensor.device for _, tensor in tensors}
    place = {"device_type": next((d.type for d in devices), "cpu"), "ranks": wrapper.ranks}
    rules = {"alone": wrapper.alone, "parts": wrapper.takes_parts}
    problem = problem_of(dict(tensors), wrapper.group, **rules) or wrapper.refusal(module)
    problem = problem or wrapper.unsupported(**place, **options)
    own = json.dumps([problem, facts])
    told = [own]
    if not wrapper.alone:
        told = told_by_all(own, wrapper.group, about=wrapper.method)
    _, first = json.loads(told[0])
    for rank, (problem, facts) in enumerate(map(json.loads, told)):
        if problem:
            raise ValueError(f"{wrapper.method}, rank {rank}: {problem}")
        for name in (*first, *facts):
            one, other = first.get(name, "none"), facts.get(name, "none")
            if one != other:
                raise ValueError(
                    f"the ranks differ in {name}: rank 0 has {one}, rank {rank} has {other}; "
                    "make the same model on every rank"
                )


# An optimizer that a trainer makes by itself is checked as well.
register_optimizer_step_pre_hook(_check_step)
