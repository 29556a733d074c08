"""What the ranks do in the tests of sharded models; the tests judge the answers."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from blockshock.data_parallel import METHODS
from blockshock.data_parallel.fully_sharded import FullySharded
from blockshock.distributed import collectives
from blockshock.distributed.ranks import device
from tests.data_parallel_jobs import refusal

TOKENS, WIDTH, ROWS = 37, 21, 12  # sizes that no number of ranks divides


class Block(nn.Module):
    """Norm, product, product; checkpoint: None, or what of it is computed again."""

    def __init__(self, width=WIDTH, again=None):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width, bias=False)
        self.again = again

    def forward(self, x):
        if self.again is not None:
            return x + checkpoint(self.inner, x, use_reentrant=self.again == "reentrant")
        return x + self.inner(x)

    def inner(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """A tied embedding, blocks, a frozen parameter in the root and one in a block, a buffer."""

    def __init__(self, blocks=3, width=WIDTH, again=None, outside=None, frozen=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList(Block(width, again) for _ in range(blocks))
        self.head = nn.Linear(width, TOKENS)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.rand(width), requires_grad=not frozen)
        self.register_buffer("shift", torch.randn(width))
        if frozen:
            self.blocks[1].down.weight.requires_grad_(False)
            for p in self.blocks[2].parameters():
                p.requires_grad_(False)
        self.outside, self.fail = outside, False

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.outside is not None:
                x = checkpoint(block, x, use_reentrant=self.outside == "reentrant")
            else:
                x = block(x)
            if self.fail:
                raise ArithmeticError("in the middle")
        return self.head(x * self.scale + self.shift)


def tokens(seed=0):
    torch.manual_seed(100 + seed)
    return torch.randint(TOKENS, (ROWS, 5)).to(device())


def own(batch):
    """This rank's rows of the batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def loss(model, batch):
    y = model(batch)
    return nn.functional.cross_entropy(y[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


def make(**options):
    """(a model in one process, the same one sharded); rank 0's values are the ones that count."""
    true, sharded = Model(**options).to(device()), Model(**options).to(device())
    if dist.get_rank():
        with torch.no_grad():
            for p in [*sharded.parameters(), *sharded.buffers()]:
                p.zero_()
    return true, sharded


def far(found: dict, true: dict) -> float:
    """The largest distance of two states, of the whole scale of each tensor."""
    assert list(found) == list(true)
    return max(
        (
            (found[n].double() - t.double()).abs().max() / t.double().abs().max().clamp(min=1e-6)
        ).item()
        for n, t in true.items()
    )


def gradients(wrapper) -> dict:
    """The whole gradients, by name."""
    return {n: wrapper.whole(n, p.grad) for n, p in wrapper.trained().items() if p.grad is not None}


GROUPS = [{"names": ["embedding.weight", "head.bias"], "lr": 0.05}]


def true_groups(model, defaults):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    first = [named[n] for n in GROUPS[0]["names"]]
    rest = [p for n, p in named.items() if n not in GROUPS[0]["names"]]
    return [{"params": first, "lr": 0.05}, {"params": rest, **defaults}]


def five_steps(cls, defaults, **options):
    """How far gradients, parameters and optimizer state are from one process's, after each step."""
    true, sharded = make(**options)
    wrapper = FullySharded(sharded)
    theirs = cls(true_groups(true, defaults), **defaults)
    optimizer = wrapper.optimizer(cls, GROUPS, **defaults)
    errors = []
    for step in range(5):
        batch = tokens(step)
        loss(true, batch).backward()
        loss(wrapper, own(batch)).backward()
        wrapper.finish_gradient_sync()
        wanted = {n: p.grad for n, p in true.named_parameters() if p.requires_grad}
        errors.append(far(gradients(wrapper), wanted))
        norms = nn.utils.clip_grad_norm_(true.parameters(), 0.1), wrapper.clip_grad_norm_(0.1)
        errors.append(abs(norms[0].item() - norms[1].item()))
        theirs.step()
        optimizer.step()
        theirs.zero_grad(set_to_none=step % 2 == 0)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        errors.append(far(wrapper.full_state_dict(), true.state_dict()))
    return errors


def recomputed(**options):
    """How far gradients are where forwards are computed again; are whole parameters freed?"""
    true, sharded = make(**options)
    wrapper = FullySharded(sharded)
    for step in range(2):
        loss(true, tokens(step)).backward()
        loss(wrapper, own(tokens(step))).backward()
        freed = [not flat.gathered for unit in wrapper._schedule.units for flat in unit.flats]
        wrapper.finish_gradient_sync()
    wanted = {n: p.grad for n, p in true.named_parameters() if p.requires_grad}
    return far(gradients(wrapper), wanted), all(freed)


def sharded(**options):
    """A sharded model alone; options of the wrapper by their names, the others the model's."""
    wraps = {
        k: options.pop(k)
        for k in ("unused", "compute_dtype", "reshard_after_forward")
        if k in options
    }
    return FullySharded(Model(frozen=False, **options).to(device()), **wraps)


def accumulated(**options):
    """How far gradients of two batches are, in no_sync and in one graph; and what is refused."""
    true, wrapper = Model(frozen=False).to(device()), sharded(**options)
    (loss(true, tokens(0)) + loss(true, tokens(1))).backward()
    wanted = {n: p.grad for n, p in true.named_parameters()}
    errors, refused = [], ""
    with wrapper.no_sync():
        loss(wrapper, own(tokens(0))).backward()
        try:
            wrapper.finish_gradient_sync()
        except RuntimeError as error:
            refused = str(error)
    loss(wrapper, own(tokens(1))).backward()
    wrapper.finish_gradient_sync()
    errors.append(far(gradients(wrapper), wanted))
    again = refusal(wrapper.finish_gradient_sync)  # without a backward
    errors.append(far(gradients(wrapper), wanted))
    wrapper.zero_grad()
    both = loss(wrapper, own(tokens(0))) + loss(wrapper, own(tokens(1)))
    both.backward(retain_graph=True)
    wrapper.finish_gradient_sync()
    errors.append(far(gradients(wrapper), wanted))
    both.backward()
    wrapper.finish_gradient_sync()
    errors.append(far(gradients(wrapper), {n: 2 * g for n, g in wanted.items()}))
    return errors, refused, again


def counted(**options):
    """(gathers, reductions) of steps, of one with gradients frozen out of it, and of evaluation."""
    wrapper = sharded(**options)

    def step(train=True):
        with counting() as seen:
            if train:
                loss(wrapper, own(tokens())).backward()
                wrapper.finish_gradient_sync()
            else:
                with torch.inference_mode():
                    loss(wrapper, own(tokens()))
        return seen["all_gather_into"], seen["reduce_scatter_into"]

    return [step(), step(), step(train=False), step()]


@contextmanager
def counting(before=lambda: None):
    """How often functions of `collectives` are called; before: called first each time."""
    seen, true = {}, {}
    for name in ("all_gather_into", "reduce_scatter_into"):
        true[name], seen[name] = getattr(collectives, name), 0

        def counted(*args, name=name):
            seen[name] += 1
            before()
            return true[name](*args)

        setattr(collectives, name, counted)
    try:
        yield seen
    finally:
        for name, function in true.items():
            setattr(collectives, name, function)


def held(width=64):
    """Bytes after a step: of parameters, gathered buffers, gradients and state; of the model."""
    model = Model(width=width, frozen=False).to(device())
    whole = sum(p.nbytes for p in model.parameters())
    wrapper = FullySharded(model)
    optimizer = wrapper.optimizer(torch.optim.AdamW, lr=0.01)
    gathered = []

    def watch(module, args):
        flats = [flat for unit in wrapper._schedule.units for flat in unit.flats]
        gathered.append(sum(flat._full.untyped_storage().size() for flat in flats))

    for block in model.blocks:
        block.norm.register_forward_pre_hook(watch)
    for _ in range(2):
        loss(wrapper, own(tokens())).backward()
        wrapper.finish_gradient_sync()
        optimizer.step()
    flats = [flat for unit in wrapper._schedule.units for flat in unit.flats]
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().size() for p in model.parameters()
    }
    return {
        "whole": whole,
        "parameters": sum(storages.values()),
        "gathered": sum(flat._full.untyped_storage().size() for flat in flats),
        "gathered at most": max(gathered),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "state": sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim),
    }


def resumed(method, start, saved=None):
    """(model, optimizer, two losses on the whole batch) after two steps from step `start`.

    saved: the first two of another run, under any method and number of ranks.
    """
    model = Model().to(device())
    wrapper = METHODS[method](model)
    optimizer = wrapper.optimizer(torch.optim.AdamW, GROUPS, lr=0.01)
    if saved is not None:
        wrapper.load_full_state_dict(saved[0])
        wrapper.load_full_optimizer_state(optimizer, saved[1])
    losses = []
    for step in range(start, start + 2):
        batch = tokens(step)
        found = loss(wrapper, batch if method == "none" else own(batch))
        found.backward()
        wrapper.finish_gradient_sync()
        optimizer.step()
        optimizer.zero_grad()
        found = found.detach()
        if method != "none":
            collectives.all_reduce(found).div_(dist.get_world_size())
        losses.append(found.item())
    state = wrapper.full_optimizer_state(optimizer, cpu=True)
    return wrapper.full_state_dict(cpu=True), state, losses


def against_torch():
    """Errors of gradients in bfloat16 under float32 masters: ours, and those of fully_shard."""
    true, model = Model(frozen=False).to(device()), Model(frozen=False).to(device())
    wrapper = sharded(compute_dtype=torch.bfloat16)
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.shift.data = model.shift.bfloat16()
    wrapper.module.shift.data = wrapper.module.shift.bfloat16()
    loss(true, tokens()).backward()
    loss(model, own(tokens())).backward()
    loss(wrapper, own(tokens())).backward()
    wrapper.finish_gradient_sync()
    theirs = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    wanted = {n: p.grad for n, p in true.named_parameters()}
    kinds = {p.grad.dtype for p in wrapper.module.parameters()}
    return far(gradients(wrapper), wanted), far(theirs, wanted), kinds == {torch.float32}


def evaluated():
    """How far outputs are between steps, without gradients; in each mode."""
    true, sharded = make()
    wrapper, errors = FullySharded(sharded), []
    theirs = torch.optim.SGD(true.parameters(), 1.0)
    optimizer = wrapper.optimizer(torch.optim.SGD, lr=1.0)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            errors.append(far({"y": wrapper(tokens()).detach()}, {"y": true(tokens()).detach()}))
        loss(true, tokens()).backward()
        loss(wrapper, own(tokens())).backward()
        wrapper.finish_gradient_sync()
        theirs.step()
        optimizer.step()
        theirs.zero_grad()
        optimizer.zero_grad()
    return errors
