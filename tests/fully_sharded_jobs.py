"""What the ranks do in the tests of sharded models; the tests judge the answers."""

import gc
from contextlib import contextmanager, suppress
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from blockshock.data_parallel import METHODS
from blockshock.data_parallel.fully_sharded import FullySharded
from blockshock.distributed import collectives
from blockshock.distributed.ranks import device

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


def refusal(call, *args, **kwargs) -> str:
    """What a call's error says; nothing if there is none."""
    try:
        call(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


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
