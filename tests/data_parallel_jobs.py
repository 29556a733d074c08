"""What the ranks do in the tests of data-parallel wrappers; the tests judge the answers."""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import blockshock
from blockshock.data_parallel import METHODS, replicated
from blockshock.distributed.ranks import device
from blockshock.measure.errors import relative_error

ROWS, TOKENS, WIDTH = 16, 11, 8  # two rows for each of eight ranks, which accumulate
GROUPS = [{"names": ["blocks.0.weight", "seven"], "lr": 0.02, "weight_decay": 0.0}]
SMALL = {  # buckets of one KiB, so that there are several
    "bucketed": {"bucket_mib": 1 / 1024},
    "overlapped": {"bucket_mib": 1 / 1024},
    "sharded_optimizer": {"bucket_mib": 1 / 1024},
    "torch_ddp": {"bucket_mib": 1 / 1024},
}
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-4}),
}


class Net(nn.Module):
    """Tied, frozen and unused parameters, a buffer, odd sizes; odd: a scalar and a second dtype."""

    def __init__(self, odd=True, seed=0, long=1009):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.long = nn.Parameter(torch.randn(long))
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.blocks[1].bias.requires_grad_(False)
        self.seven = nn.Parameter(torch.randn(7))
        self.one = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.randn(WIDTH))
        self.odd = odd
        if odd:
            self.scalar = nn.Parameter(torch.tensor(0.5))
            self.wide = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
            crossed = torch.randn(WIDTH, 5).t()  # strides that a buffer must keep
            self.crossed = nn.Parameter(crossed)
            self.turned = nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, tokens):
        x = self.embedding(tokens) + self.long[tokens * 90001 % len(self.long), None] * self.one
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        x = torch.cat((x[..., :7] * self.seven, x[..., 7:]), -1) + self.shift
        if self.odd:
            x = x + self.scalar * self.wide.to(x.dtype)
            x = x + torch.tanh(x @ self.crossed.t()) @ self.turned
        return self.head(x)


def batch(step):
    torch.manual_seed(1000 + step)
    return torch.randint(TOKENS, (ROWS, 6)).to(device())


def loss(model, tokens):
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.roll(1, 1).flatten())


def own(tokens):
    """This rank's rows."""
    return tokens.chunk(dist.get_world_size())[dist.get_rank()]


def net(method, **options):
    """Methods that shard parameters take neither scalars nor two dtypes."""
    return Net(odd="fs" not in method and method != "fully_sharded", **options).to(device())


def wrap(method, seed=0, **options):
    return METHODS[method](net(method, seed=seed), **{**SMALL.get(method, {}), **options})


def truth(method, optimizer):
    model = METHODS["none"](net(method))
    cls, options = OPTIMIZERS[optimizer]
    return model, model.optimizer(cls, GROUPS, **options)


def apart(a, b):
    """The largest relative error of tensors by name."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(relative_error(a[n].detach().double(), b[n].detach().double()) for n in a)


def gradients_apart(model, true):
    """Of this rank's gradients and those of one process; every one must be there."""
    found, wanted = {}, {}
    for name, tensor in model.trained().items():
        whole = true.get_parameter(f"module.{name}").grad
        pair = tensor.grad, model.share(name, whole)
        found[name], wanted[name] = (t.to_local() if isinstance(t, DTensor) else t for t in pair)
    filled = {n for n, t in wanted.items() if t.numel()}
    return apart({n: found[n] for n in filled}, {n: wanted[n] for n in filled}) if filled else 0.0


def step(model, optimizer, tokens, micro=1, set_to_none=True, clip=0.5):
    """One step; the norm before clipping."""
    *first, last = tokens.chunk(micro)
    for part in first:
        with model.no_sync():
            (loss(model, part) / micro).backward()
    (loss(model, last) / micro).backward()
    model.finish_gradient_sync()
    norm = model.clip_grad_norm_(clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    return norm


def like_one_process(method, steps=5, long=1000003, **options):
    """Relative errors against one process on the whole batch, by optimizer, mode and thing."""
    errors = {}
    modes = {"plain": {}, "accumulated": {"micro": 2, "set_to_none": False}}
    for name, (cls, defaults) in OPTIMIZERS.items():
        for mode, how in modes.items():
            extra = {"long": long} if mode == "plain" else {}
            true = METHODS["none"](net(method, **extra))
            stepper = true.optimizer(cls, GROUPS, **defaults)
            options = {**SMALL.get(method, {}), **options}
            model = METHODS[method](net(method, seed=dist.get_rank(), **extra), **options)
            optimizer = model.optimizer(cls, GROUPS, **defaults)
            schedules = [
                torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (stepper, optimizer)
            ]
            for number in range(steps):
                tokens = batch(number)
                norms = (
                    step(true, stepper, tokens, set_to_none=False),
                    step(model, optimizer, own(tokens), **how),
                )
                errors[name, mode, "norm", number] = relative_error(*reversed(norms))
                for schedule in schedules:
                    schedule.step()
            loss(true, batch(99)).backward()
            loss(model, own(batch(99))).backward()
            model.finish_gradient_sync()
            errors[name, mode, "gradients"] = gradients_apart(model, true)
            whole = model.full_state_dict(cpu=True)
            errors[name, mode, "values"] = apart(whole, true.full_state_dict(cpu=True))
            states = (
                each.full_optimizer_state(o, cpu=True)["state"]
                for each, o in ((model, optimizer), (true, stepper))
            )
            errors[name, mode, "state"] = apart(*map(_flat, states))
    return {" ".join(map(str, key)): value for key, value in errors.items()}


def _flat(state):
    return {f"{n} {k}": v for n, entries in state.items() for k, v in entries.items()}


def broken_mean():
    """The errors of `overlapped` where the sum is not divided."""
    right = replicated.start_mean

    def start_sum(tensor, group=None):
        done = right(tensor, group)
        return lambda: (done(), tensor.mul_(dist.get_world_size()))

    replicated.start_mean = start_sum
    try:
        return like_one_process("overlapped", steps=1, long=1009)
    finally:
        replicated.start_mean = right


def saved(first, second):
    """Three steps by one method and three by another; apart from six of one process."""
    errors = []
    for name, (cls, defaults) in OPTIMIZERS.items():
        true, stepper = truth("torch_fsdp", name)
        small = [METHODS[m](net("torch_fsdp"), **SMALL.get(m, {})) for m in (first, second)]
        optimizers = [m.optimizer(cls, GROUPS, **defaults) for m in small]
        for number in range(6):
            late = number >= 3
            if number == 3:
                small[1].load_full_state_dict(small[0].full_state_dict())
                state = small[0].full_optimizer_state(optimizers[0], cpu=True)
                before = copy.deepcopy(state)
                small[1].load_full_optimizer_state(optimizers[1], state)
            step(true, stepper, batch(number))
            step(small[late], optimizers[late], own(batch(number)))
        whole = small[1].full_state_dict(cpu=True)
        errors.append(apart(whole, true.full_state_dict(cpu=True)))
        assert apart(_flat(state["state"]), _flat(before["state"])) == 0, "steps wrote into it"
    other = small[1].optimizer(cls, [], **defaults)
    return errors, refusal(small[1].load_full_optimizer_state, other, state)


def refusal(fn, *args, **kwargs):
    """What it says, or None."""
    try:
        fn(*args, **kwargs)
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def views(method):
    """Where gradients are after each kind of zero_grad: (all in their buckets, same places)."""
    model = wrap(method)
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
    seen = []
    for set_to_none in (True, False, True, True):
        loss(model, own(batch(0))).backward()
        model.finish_gradient_sync()
        places = {n: p.grad.data_ptr() for n, p in model.trained().items()}
        spans = [
            range(b.buffer.data_ptr(), b.buffer.data_ptr() + b.buffer.nbytes)
            for b in model.gradients.buckets
        ]
        seen.append((all(any(p in s for s in spans) for p in places.values()), places))
        optimizer.zero_grad(set_to_none=set_to_none)
    kinds = [{p.dtype for p in bucket.parameters} for bucket in model.gradients.buckets]
    return [inside for inside, _ in seen], len({str(p) for _, p in seen}), kinds


class Part(nn.Module):
    """Two layers, of which a rank uses the second or not."""

    def __init__(self, **embedding):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.table = nn.Embedding(4, 3, **embedding)
        self.use = True

    def forward(self, x):
        x = self.a(x) + self.table(torch.arange(len(x), device=x.device))
        return (self.b(x) if self.use else x).square().sum()


def data():
    torch.manual_seed(dist.get_rank())
    return torch.randn(2, 3).to(device())


def unused(method):
    """The error; and with zeros, b's gradients where rank 0 alone, and where no rank uses b."""
    model = METHODS[method](Part().to(device()))
    model.module.use = False
    model(data()).backward()
    text = refusal(model.finish_gradient_sync)
    part, alone = Part().to(device()), Part().to(device())
    model = METHODS[method](part, unused="zero")
    part.use = dist.get_rank() == 0
    model(data()).backward()
    model.finish_gradient_sync()
    found = model.trained()["b.bias"].grad if "b.bias" in model.trained() else None
    torch.manual_seed(0)
    alone(torch.randn(2, 3).to(device())).backward()  # what rank 0 has
    right = None
    if found is not None:
        wanted = model.share("b.bias", alone.b.bias.grad / dist.get_world_size())
        right = torch.allclose(found, wanted)
    part.use = False
    model.module.zero_grad()
    model(data()).backward()
    model.finish_gradient_sync()
    zero = all(not t.grad.any() for n, t in model.trained().items() if n.startswith("b."))
    return text, right, zero


def refused(method):
    """What a wrapper says, by what is done to it."""
    said = {}

    def fresh(**options):
        model = METHODS[method](Part(**options).to(device()))
        return model, model.optimizer(torch.optim.SGD, lr=0.1)

    model, sgd = fresh()
    said["no backward"] = refusal(model.finish_gradient_sync)
    model(data()).backward()
    said["step before"] = refusal(sgd.step)
    with model.no_sync():
        said["inside no_sync"] = refusal(model.finish_gradient_sync)
    model.finish_gradient_sync()
    said["second call"] = refusal(model.finish_gradient_sync)
    zero = METHODS[method](Part().to(device()), unused="zero")
    zero(data()).backward()
    zero.finish_gradient_sync()
    said["second call, zero"] = refusal(zero.finish_gradient_sync)
    frozen = METHODS[method](nn.Linear(2, 2).to(device()).requires_grad_(False))
    said["nothing to train"] = refusal(frozen.finish_gradient_sync)
    said["right"] = refusal(sgd.step)
    said["copied"] = refusal(copy.deepcopy, model)
    said["unknown name"] = refusal(model.optimizer, torch.optim.SGD, [{"names": ["c"]}])
    twice = [{"names": ["a.bias"]}, {"names": ["a.bias"]}]
    said["name twice"] = refusal(model.optimizer, torch.optim.SGD, twice)
    model, _ = fresh()
    model.module.a.bias.requires_grad_(False)
    said["frozen"] = refusal(backward_and_finish, model, data())
    part = Part().to(device())
    part.a.bias.requires_grad_(False)
    model = METHODS[method](part)
    part.a.bias.requires_grad_(True)
    said["unfrozen"] = refusal(backward_and_finish, model, data())
    said["sparse"] = refusal(lambda: backward_and_finish(fresh(sparse=True)[0], data()))
    model, _ = fresh()
    with model.no_sync():
        said["graph"] = refusal(model(data()).backward, create_graph=True)
    model, _ = fresh()
    model(data()).backward()
    model.finish_gradient_sync()
    model.module.double()
    said["cast"] = refusal(backward_and_finish, model, data().double())
    return said


def backward_and_finish(model, x):
    model(x).backward()
    model.finish_gradient_sync()


class Twice(nn.Module):
    """One layer, used as `way` says."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = (nn.Linear(3, 3) for _ in range(3))
        self.way = way

    def forward(self, x):
        x, reentrant = self.first(x), self.way.startswith("reentrant")
        if self.way == "twice":
            x = self.shared(torch.tanh(self.shared(x)))
        elif self.way.endswith("one segment"):
            x = checkpoint(lambda y: torch.tanh(self.shared(y)), x, use_reentrant=reentrant)
        else:
            for _ in range(2):
                x = checkpoint(lambda y: torch.tanh(self.shared(y)), x, use_reentrant=reentrant)
        return self.last(x).square().sum()


def hard_graph(method, way):
    """(error of the gradients, or what it says) for a layer used in this way, or two backwards."""
    backwards = {"two backwards": 2, "retained": 2, "two in no_sync": 2}.get(way, 1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    true = METHODS["none"](Twice(way if backwards == 1 else "twice").to(device()))
    options = {"bucket_mib": 1e-5} if method in SMALL else {}  # a bucket a parameter
    model = METHODS[method](copy.deepcopy(true.module), **options)
    for each in range(ranks):
        torch.manual_seed(each)
        (true(torch.randn(2, 3).to(device())) * backwards / ranks).backward()
    torch.manual_seed(rank)
    x = torch.randn(2, 3).to(device())
    try:
        if way == "retained":
            out = model(x)
            out.backward(retain_graph=True)
            out.backward()
        elif way == "two backwards":
            model(x).backward()
            model(x).backward()
        elif way == "two in no_sync":
            with model.no_sync():
                model(x).backward()
            model(x).backward()
        else:
            model(x).backward()
        model.finish_gradient_sync()
    except RuntimeError as error:
        for bucket in model.gradients.buckets:  # collectives that are under way
            if bucket.finish is not None:
                bucket.finish()
        return str(error)
    return gradients_apart(model, true)


def construction(method):
    """Ranks that begin apart are rank 0's; what is said where they are not alike."""
    rank, said = dist.get_rank(), {}
    model, first = wrap(method, seed=rank), net(method)
    values, wanted = model.full_state_dict(cpu=True), first.state_dict()
    said["values"] = max(
        float((values[n].double() - wanted[n].cpu().double()).abs().max()) for n in wanted
    )
    cls = METHODS[method]
    said["shape"] = refusal(cls, nn.Linear(3, 3 + rank).to(device()))
    deeper = nn.Sequential(*[nn.Identity()] * rank, nn.Linear(3, 3))
    said["name"] = refusal(cls, deeper.to(device()))
    said["dtype"] = refusal(cls, nn.Linear(3, 3).to(device(), torch.float64 if rank else None))
    frozen = nn.Linear(3, 3).to(device())
    frozen.weight.requires_grad_(rank == 0)
    said["trained"] = refusal(cls, frozen)
    said["lazy"] = refusal(cls, nn.LazyLinear(3).to(device()) if rank else frozen)
    said["meta"] = refusal(cls, nn.Linear(3, 3, device="meta") if rank else frozen)
    return said


def options_that_differ():
    rank = dist.get_rank()
    layer = nn.Linear(3, 3).to(device())
    cls = METHODS["overlapped"]
    return (
        refusal(cls, layer, bucket_mib=25.0 + rank),
        refusal(cls, layer, bucket_mib=0),
        refusal(cls, layer, unused="skip"),
    )


class Own(torch.optim.SGD):
    """A class of somebody's own, of which nothing is known."""


class Said(torch.optim.SGD):
    elementwise = True


def state_of_shares():
    """Entries of the sharded state over those of the whole, and which classes are refused."""
    model = wrap("sharded_optimizer")
    cls, options = OPTIMIZERS["AdamW"]
    optimizer = model.optimizer(cls, GROUPS, **options)
    step(model, optimizer, own(batch(0)))
    held = sum(t.numel() for entries in optimizer.state.values() for t in entries.values())
    whole = sum(2 * p.numel() for p in model.module.parameters() if p.requires_grad)
    said = {
        cls.__name__: refusal(model.optimizer, cls, lr=0.1)
        for cls in (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon, Own, Said)
    }
    left = [p.grad is None for p in model.module.parameters()]
    return held / whole, said, all(left)


def version_counts(method):
    """Whether autograd sees that a parameter was stepped between forward and backward."""
    model = wrap(method)
    sgd = model.optimizer(torch.optim.SGD, lr=0.1)
    step(model, sgd, own(batch(0)))
    value = loss(model, own(batch(0)))
    sgd.step()
    return refusal(value.backward)


def fails_in_a_step(method):
    """Rank 1 fails in its second backward; the others wait for it."""
    model = wrap(method)
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
    step(model, optimizer, own(batch(0)))
    if dist.get_rank() == 1:
        raise ArithmeticError("no more data")
    step(model, optimizer, own(batch(1)))


def gone():
    """Whether a wrapper's buckets go with it, and its module trains on alone."""
    part = Part().to(device())
    model = METHODS["overlapped"](part)
    buffer = model.gradients.buckets[0].buffer
    del model
    part(data()).backward()
    start = buffer.data_ptr()
    inside = range(start, start + buffer.nbytes)
    return all(p.grad.data_ptr() not in inside for p in part.parameters())


def compiled(method):
    """The error of the gradients where the whole wrapper is compiled."""
    true, model = METHODS["none"](net(method)), wrap(method)
    loss(true, batch(0)).backward()
    loss(torch.compile(model, backend="aot_eager"), own(batch(0))).backward()
    model.finish_gradient_sync()
    return gradients_apart(model, true)


def layouts():
    """Whether gradients have a channels-last weight's strides; then what two wrappers say."""
    conv = nn.Conv2d(4, 8, 3).to(device(), memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8).to(device(), memory_format=torch.channels_last)
    model = METHODS["overlapped"](conv)
    model(x).sum().backward()
    model.finish_gradient_sync()
    same = conv.weight.grad.stride() == conv.weight.stride()
    second = METHODS["overlapped"](conv)
    second(x).sum().backward()
    return same, refusal(model.finish_gradient_sync), refusal(second.finish_gradient_sync)


def parts_of_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)).to(device())
    blockshock.convert(model, "dense_tp_row")
    return refusal(METHODS["overlapped"], model)
