"""What the ranks do in the tests of unusual uses of sharded models; the tests judge the answers."""

import gc
from contextlib import suppress
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from blockshock.data_parallel.fully_sharded import FullySharded
from blockshock.distributed.ranks import device
from tests.data_parallel_jobs import refusal
from tests.fully_sharded_jobs import (
    ROWS,
    Model,
    counting,
    far,
    gradients,
    loss,
    own,
    sharded,
    tokens,
)


def after_an_error():
    """Is a step right after a forward that raised, with what was gathered freed?"""
    true, wrapper = Model(frozen=False).to(device()), sharded()
    loss(wrapper, own(tokens(3)))  # and a graph that has no backward
    wrapper.module.fail = True
    with suppress(ArithmeticError):
        loss(wrapper, own(tokens(3)))
    last = wrapper._schedule._last
    freed = [not f.gathered for u in wrapper._schedule.units if u is not last for f in u.flats]
    shares = all(p.ndim == 1 for p in wrapper.module.parameters())
    wrapper.module.fail = False
    loss(true, tokens()).backward()
    loss(wrapper, own(tokens())).backward()
    wrapper.finish_gradient_sync()
    return far(gradients(wrapper), {n: p.grad for n, p in true.named_parameters()}), freed, shares


class Branches(nn.Module):
    """Uses one of two products."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.list = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x, first=True):
        x = self.list[0](self.list[1](x))
        return self.one(x) if first else self.two(x)


def unused():
    """What is said of unused parameters, in a unit and of a whole one; gradients where zero."""
    x, texts = torch.randn(4, 8).to(device()), []
    for option in ("error", "zero"):
        wrapper = FullySharded(Branches().to(device()), unused=option)
        wrapper(x).sum().backward()
        texts.append(refusal(wrapper.finish_gradient_sync))
        found = gradients(wrapper)
    zero = sorted(n for n, g in found.items() if not g.any())
    # Over two backwards every one of the root's is used.
    wrapper = FullySharded(Branches().to(device()))
    wrapper(x).sum().backward()
    wrapper(x, first=False).sum().backward()
    texts.append(refusal(wrapper.finish_gradient_sync))
    return texts, zero, sorted(set(dict(wrapper.module.named_parameters())) - set(found))


def refused():
    """By case: what is said."""
    said, batch = {}, own(tokens())
    for name, option in {"unused": "no", "compute_dtype": torch.float16}.items():
        said[name] = refusal(sharded, **{name: option})
    wraps = partial(refusal, FullySharded)
    said["lstm"] = wraps(nn.LSTM(4, 4).to(device()))
    said["sparse"] = wraps(nn.Embedding(4, 4, sparse=True).to(device()))
    said["scalar"] = wraps(nn.ParameterList([torch.ones(())]).to(device()))
    wrapper = sharded()
    said["lbfgs"] = refusal(wrapper.optimizer, torch.optim.LBFGS)
    state = wrapper.full_state_dict()
    said["shape"] = refusal(wrapper.load_full_state_dict, {**state, "head.bias": state["shift"]})
    optimizer = wrapper.optimizer(torch.optim.SGD, lr=0.1)
    loss(wrapper, batch).backward()
    said["step"] = refusal(optimizer.step)
    wrapper.finish_gradient_sync()
    share = wrapper.module.head.bias
    said["grad"] = refusal(torch.autograd.grad, loss(wrapper, batch), share)
    share.requires_grad_(False)
    said["frozen"] = refusal(wrapper, batch)
    share.requires_grad_(True)
    said["none"] = refusal(wrapper, batch)
    second = FullySharded(Branches().to(device()))
    said["wrapped twice"] = wraps(second.module)
    norm = wrapper.module.blocks[0].norm
    norm.bias = nn.Parameter(norm.bias.detach())
    said["replaced"] = refusal(wrapper, batch)
    wrapper.double()
    said["cast"] = refusal(wrapper, batch)
    return said


def of_inputs():
    """Gradients of inputs alone: how far, and whether the parameters have none."""
    wrapper, other = FullySharded(Branches().to(device())), Branches().to(device())
    x = torch.randn(4, 8).to(device()).requires_grad_()
    (found,) = torch.autograd.grad(wrapper(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(other(x).square().sum(), x)
    none = all(p.grad is None for p in wrapper.module.parameters())
    return (found - wanted).abs().max().item(), none


def compiled(how):
    """How far gradients are where blocks are compiled; graphs after each of three steps."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    true, model = Model(frozen=False).to(device()), Model(frozen=False).to(device())
    if how == "blocks before":
        for block in model.blocks:
            block.compile(backend=counter)
    wrapper = FullySharded(model)
    if how == "blocks":
        for block in model.blocks:
            block.compile(backend=counter)
    call = torch.compile(wrapper, backend=counter) if how == "whole" else wrapper
    graphs = []
    for step in range(3):
        loss(true, tokens(step)).backward()
        loss(call, own(tokens(step))).backward()
        wrapper.finish_gradient_sync()
        graphs.append(counter.frame_count)
    found = gradients(wrapper)
    return far(found, {n: p.grad for n, p in true.named_parameters()}), graphs


class Stack(nn.Module):
    """Blocks by a function of (block, x), whose result is the next x."""

    def __init__(self, run, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.run, self.blocks = run, nn.ModuleList(Views() for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return x


class Views(nn.Module):
    """Returns a view of what it computes, in a tuple with what a second output is."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x, *, scale=None):
        h = torch.tanh(self.up(x))
        return self.down(h).view(-1, 8), {"mean": h.mean(-1, keepdim=True), "x": x}


def in_place(block, x):
    y, _ = block(x)
    y += x
    return y


def twice(block, x):
    return block(block(x)[0])[0]


def both_outputs(block, x):
    y, other = block(x, scale=x)
    return y * other["mean"] + other["x"]


STACKS = {"in place": in_place, "twice": twice, "both outputs": both_outputs}


def stacked(kind):
    """How far gradients of parameters and of the input are in a stack; is all freed?"""
    true, wrapper = Stack(STACKS[kind]).to(device()), FullySharded(Stack(STACKS[kind]).to(device()))
    x = torch.randn(ROWS, 8).to(device())
    errors = []
    for _ in range(3):
        x_true, x_own = x.clone().requires_grad_(), own(x).clone().requires_grad_()
        true(x_true).square().mean().backward()
        wrapper(x_own).square().mean().backward()
        freed = [not flat.gathered for unit in wrapper._schedule.units for flat in unit.flats]
        wrapper.finish_gradient_sync()
        found = {**gradients(wrapper), "x": x_own.grad / dist.get_world_size()}
        wanted = {n: p.grad for n, p in true.named_parameters()}
        errors.append(far(found, {**wanted, "x": own(x_true.grad)}))
    return errors, freed


def in_a_group():
    """How far gradients are over two of four ranks, of a module that has no list of blocks."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[dist.get_rank() % 2]
    torch.manual_seed(dist.get_rank() % 2)
    true, batch = nn.Sequential(Views(), nn.Identity()).to(device()), torch.randn(4, 8).to(device())
    sharded = nn.Sequential(Views(), nn.Identity()).to(device())
    sharded.load_state_dict(true.state_dict())
    wrapper = FullySharded(sharded, group=group)
    true(batch)[0].square().mean().backward()
    wrapper(batch.chunk(2)[dist.get_rank(group)])[0].square().mean().backward()
    wrapper.finish_gradient_sync()
    norms = [
        nn.utils.get_total_norm([p.grad for p in true.parameters()]),
        wrapper.clip_grad_norm_(9),
    ]
    error = far(gradients(wrapper), {n: p.grad for n, p in true.named_parameters()})
    return max(error, abs(norms[0] - norms[1]).item())


def delayed():
    """How far gradients are where the computation or the communication is late, on some ranks."""
    errors = []
    for late in ("computation", "communication"):
        true, wrapper = Model(frozen=False).to(device()), sharded()
        cycles = 2_000_000 * (1 + dist.get_rank() % 2)  # about a millisecond
        sleep = partial(torch.cuda._sleep, cycles)

        def late_gradient(module, args, y, sleep=sleep):
            sleep()
            y.register_hook(lambda _: sleep())

        if late == "computation":
            for part in wrapper.module.modules():
                if isinstance(part, nn.Linear):
                    part.register_forward_hook(late_gradient)
        with counting(before=sleep if late == "communication" else lambda: None):
            for step in range(4):
                loss(true, tokens(step)).backward()
                loss(wrapper, own(tokens(step))).backward()
                wrapper.finish_gradient_sync()
                wanted = {n: p.grad for n, p in true.named_parameters()}
                errors.append(far(gradients(wrapper), wanted))
                true.zero_grad()
                wrapper.zero_grad()
    return errors


def peaks():
    """Most bytes allocated in each of four steps: ours, and fully_shard's."""
    found = {}
    for name in ("own", "torch"):
        gc.collect()  # hooks and modules refer to each other
        start = torch.cuda.memory_allocated()
        model = Model(blocks=6, width=1024, frozen=False).to(device())
        model.shift.data = model.shift.bfloat16()
        if name == "own":
            model = FullySharded(model, compute_dtype=torch.bfloat16)
            optimizer = model.optimizer(torch.optim.AdamW, lr=1e-3)
        else:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            mesh = init_device_mesh(device().type, (dist.get_world_size(),))
            for block in model.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found[name] = []
        for step in range(4):
            torch.cuda.reset_peak_memory_stats()
            loss(model, own(tokens(step))).backward()
            if name == "own":
                model.finish_gradient_sync()
            optimizer.step()
            optimizer.zero_grad()
            found[name].append(torch.cuda.max_memory_allocated() - start)
        del model, optimizer
    return found
