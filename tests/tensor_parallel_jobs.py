"""What ranks run for tests/test_tensor_parallel.py; the tests judge the answers."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from blockshock.data_parallel import METHODS
from blockshock.distributed import collectives
from blockshock.distributed.ranks import device
from blockshock.transformer import Decoder, DecoderConfig, TensorParallelDecoder, compile_model
from blockshock.transformer.sync import plan as named_plan
from tests.simulated_plans import simulate

SIZES = {"vocabulary": 64, "context": 16, "width": 32, "depth": 4, "heads": 4, "hidden": 24}
PLANS = (
    *("tp", "spd", "3", "2", "1", "selective:[0,3,4]"),
    *("desync:tp", "desync:spd", "desync:2", "parallel"),
)


def config(**changed):
    return DecoderConfig(**{**SIZES, "bias": True, "attention": "reference", **changed})


def weights(c, seed=0, dtype=torch.float32):
    """The state_dict of a decoder whose biases and scales are not those of a new one."""
    g = torch.Generator().manual_seed(seed)
    state = Decoder(c, generator=g).state_dict()
    for name, value in state.items():
        if name.endswith("norm.weight"):
            value.add_(torch.randn(value.shape, generator=g), alpha=0.3)
        elif name.endswith("bias"):
            value.normal_(0, 0.3, generator=g)
        elif name != "head.linear.weight" or not c.tied:
            value.mul_(6)
    return {name: value.to(device(), dtype) for name, value in state.items()}


def batch(c, seed=1, B=2, T=None):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(c.vocabulary, (2, B, T or c.context), generator=g)
    tokens[1, 0, :3] = -100
    return tokens.to(device()).unbind()


def made(c, state, plan, *, compile_with=None, **options):
    g = torch.Generator().manual_seed(0)
    model = TensorParallelDecoder(c, plan=plan, generator=g, device=device(), **options)
    model.to(next(iter(state.values())).dtype).load_full_state_dict(state)
    return compile_model(model, backend=compile_with) if compile_with else model


def truth(c, state, plan, ranks, tokens, targets):
    """(logits, loss, gradients by name) of the simulation."""
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    if c.tied:
        del leaves["head.linear.weight"]
    logits = simulate(c, leaves, named_plan(plan, c.depth), ranks, tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    return logits.detach(), loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


class Counted:
    """Counts the collectives of a stretch of code."""

    def __enter__(self):
        self.number, self.real = 0, (dist.all_reduce, collectives.all_gather_tensor)
        dist.all_reduce, collectives.all_gather_tensor = map(self._counting, self.real)
        return self

    def _counting(self, function):
        def counting(*args, **options):
            self.number += 1
            return function(*args, **options)

        return counting

    def __exit__(self, *_):
        dist.all_reduce, collectives.all_gather_tensor = self.real


def apart(found, true):
    """The relative error of a tensor, or the largest of a dict of tensors."""
    if isinstance(true, dict):
        assert found.keys() == true.keys()
        return max(apart(found[name], true[name]) for name in true)
    return float((found - true).norm() / true.norm())


def against_truth(c, plan, *, dtype=torch.float32, seed=0, **options):
    """Errors against the simulation, the collectives of a step, and whether replicas are equal."""
    state, (tokens, targets) = weights(c, seed, dtype), batch(c, seed + 1)
    model = made(c, state, plan, **options)
    ranks = dist.get_world_size()
    logits, loss, gradients = truth(c, state, plan, ranks, tokens, targets)
    with Counted() as forward:
        found = model(tokens, targets)
    with Counted() as backward:
        found.backward()
    return {
        "logits": apart(model(tokens).detach(), logits),
        "loss": apart(found.detach(), loss),
        "gradients": apart(model.gather_gradients(), gradients),
        "collectives": (forward.number, backward.number),
        "same": same_on_all(model, found.detach()),
    }


def same_on_all(model, *tensors):
    """Whether what all ranks hold whole, and its gradients, are the same bits."""
    parts = {name for name, _ in model._cuts()}
    whole = [p for name, p in model.named_parameters() if name not in parts]
    tensors = [*tensors, *(p.detach() for p in whole), *(p.grad for p in whole)]
    return all(collectives.same_on_all_ranks(t) for t in tensors if t is not None)


def all_plans(plans=PLANS, **changed):
    options = {k: changed.pop(k) for k in ("vocabulary_parallel", "dtype") if k in changed}
    c = config(**changed)
    return {plan: against_truth(c, plan, **options) for plan in plans}


def compiled(plan, **options):
    """Errors and gradients of a compiled model against the same one eager; how many graphs."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    c = config()
    state, (tokens, targets) = weights(c), batch(c)
    found = []
    for compile_with in (None, backend):
        model = made(c, state, plan, compile_with=compile_with, **options)
        loss = model(tokens, targets)
        loss.backward()
        found.append({"loss": loss.detach()} | model.gather_gradients())
    return apart(found[1], found[0]), len(graphs)


def groups(tensor):
    """(this rank's tensor-parallel group, its data-parallel group), tensor ranks side by side."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = [list(range(at, at + tensor)) for at in range(0, ranks, tensor)]
    columns = [list(range(at, ranks, tensor)) for at in range(tensor)]
    made = {tuple(members): dist.new_group(members) for members in (*rows, *columns)}
    mine = [made[tuple(members)] for each in (rows, columns) for members in each if rank in members]
    return mine[0], mine[1]


def trained_like_simulation(method, plan, steps=3, clip=0.5, **options):
    """Errors of the norms and weights of some steps on tensor 2 x data 2 ranks; equal replicas."""
    tensor, data = groups(2)
    c = config(depth=2, **options)
    state, batches = weights(c), [batch(c, seed, B=4) for seed in range(steps)]
    model = made(c, state, plan, group=tensor, vocabulary_parallel=True)
    wrapper = METHODS[method](model, group=data)
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    del leaves["head.linear.weight"]
    adam = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4}
    optimizer = wrapper.optimizer(torch.optim.AdamW, **adam)
    true = torch.optim.AdamW(leaves.values(), **adam)
    norms, mine = [], slice(dist.get_rank(data), None, 2)
    for tokens, targets in batches:
        logits = simulate(c, leaves, named_plan(plan, c.depth), 2, tokens)
        halves = [
            F.cross_entropy(logits[half::2].flatten(0, 1), targets[half::2].flatten())
            for half in range(2)
        ]
        (sum(halves) / 2).backward()
        expected = torch.nn.utils.clip_grad_norm_(leaves.values(), clip)
        wrapper(tokens[mine], targets[mine]).backward()
        wrapper.finish_gradient_sync()
        norms.append(apart(wrapper.clip_grad_norm_(clip), expected))
        for each in (true, optimizer):
            each.step()
            each.zero_grad()
    found = model.full_state_dict()
    del found["head.linear.weight"]
    true = {name: leaf.detach() for name, leaf in leaves.items()}
    parts = {name for name, _ in model._cuts()}
    shared = [p.detach() for name, p in model.named_parameters() if name not in parts]
    same = all(collectives.same_on_all_ranks(value) for value in (*shared, *found.values()))
    return max(norms), apart(found, true), same


def refused_methods():
    """What is said where parts of weights would be averaged, or sharded again."""
    tensor, data = groups(2)
    c = config(depth=1)
    model, said = made(c, weights(c), "tp", group=tensor), []
    for method, group in (("overlapped", tensor), ("fully_sharded", data), ("torch_fsdp", data)):
        try:
            METHODS[method](model, group=group)
        except ValueError as error:
            said.append(str(error))
    return said
