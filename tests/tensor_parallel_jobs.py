"""What ranks run for tests/test_tensor_parallel.py; the tests judge the answers."""

import copy
import random

import torch
import torch.distributed as dist
import torch.nn.functional as F

from blockshock.attention import patterns
from blockshock.data_parallel import METHODS
from blockshock.distributed import collectives, here
from blockshock.linear.part import PartWeight
from blockshock.measure.errors import limit
from blockshock.transformer import Decoder, DecoderConfig, TensorParallelDecoder, compile_model
from blockshock.transformer.sync import plan as named_plan
from tests.simulated_plans import simulate

SIZES = {"vocabulary": 64, "context": 16, "width": 32, "depth": 4, "heads": 4, "hidden": 24}
PLANS = (
    *("tp", "spd", "3", "2", "1", "selective:[0,3,4]"),
    *("desync:tp", "desync:spd", "desync:2", "parallel"),
)


def device():
    """Of this rank, or the CPU of the test itself."""
    return torch.device("cpu") if here.rank() is None else here.device()


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
    return float((found - true).detach().norm() / true.detach().norm())


def against_truth(c, plan, *, dtype=torch.float32, seed=0, **options):
    """The collectives of forward and backward, errors, which rank 0 finds, and whether replicas are
    equal, after a step as well.
    """
    state, (tokens, targets) = weights(c, seed, dtype), batch(c, seed + 1)
    model = made(c, state, plan, **options)
    ranks = dist.get_world_size()
    with Counted() as forward:
        found = model(tokens, targets)
    with Counted() as backward:
        found.backward()
    logits, whole = model(tokens).detach(), model.gather_gradients()
    same = same_on_all(model, found.detach(), logits)
    torch.optim.AdamW(model.parameters()).step()
    answer = {
        "collectives": (forward.number, backward.number),
        "same": same and same_on_all(model),
    }
    if dist.get_rank() == 0:
        true_logits, loss, gradients = truth(c, state, plan, ranks, tokens, targets)
        answer["logits"] = apart(logits, true_logits)
        answer["loss"] = apart(found.detach(), loss)
        answer["gradients"] = apart(whole, gradients)
    return answer


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


def clipped_beside_none(method):
    """The norm before clipping, and PyTorch's, where the parts' group is the default one."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    c = config(depth=1)
    state, (tokens, targets) = weights(c), batch(c)
    norms = []
    for wrap in (METHODS[method], lambda model, group: model):
        wrapper = wrap(made(c, state, "spd"), group=alone)
        wrapper(tokens, targets).backward()
        if norms:
            norms.append(torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 1.0))
        else:
            wrapper.finish_gradient_sync()
            norms.append(wrapper.clip_grad_norm_(1.0))
    return apart(*norms)


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


def decoded(c_options, plan, vocabulary_parallel):
    """Errors of logits step by step, of a generated text, and collectives of a step."""
    c = config(**c_options)
    state, (tokens, _) = weights(c), batch(c)
    model = made(c, state, plan, vocabulary_parallel=vocabulary_parallel)
    whole = model(tokens).detach()
    caches, worst = model.cache(*tokens.shape), 0.0
    for t in range(tokens.shape[1]):
        with Counted() as counted:
            logits = model.decode_step(tokens[:, t : t + 1], caches, t)
        worst = max(worst, apart(logits, whole[:, t]))
    found = model.generate(tokens[:, :3], 8, temperature=0)
    for length in range(3, 11):
        likeliest = model(found[:, :length])[:, -1].argmax(-1)
        assert torch.equal(found[:, length], likeliest)
    return worst, counted.number, collectives.same_on_all_ranks(found)


def sampled():
    """Whether ranks with different seeds write the same text."""
    c = config()
    model, (tokens, _) = made(c, weights(c), "spd"), batch(c)
    torch.manual_seed(dist.get_rank())
    return collectives.same_on_all_ranks(model.generate(tokens[:, :3], 8))


def per_head_pattern(plan):
    """Errors with a mask of each head's own, and how many heads the ranks' patterns have."""
    mask = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(5)) < 0.5
    mask |= torch.eye(16, dtype=torch.bool)
    pattern = patterns.from_mask(mask.to(device()))
    c = config(pattern=pattern)
    return against_truth(c, plan)


def dense_again(**options):
    """Whether the dense weights come back, from whatever number of ranks they were drawn on."""
    c = config(tied=False)
    g = torch.Generator().manual_seed(3)
    model = TensorParallelDecoder(c, plan="1", generator=g, device=device(), **options)
    drawn = Decoder(c, generator=torch.Generator().manual_seed(3), device=device())
    true, found = drawn.state_dict(), model.to_dense().state_dict()
    return found.keys() == true.keys() and all(torch.equal(found[n], true[n]) for n in true)


def used_otherwise():
    """Uses of a model outside the laboratory: what each gives or says."""
    c = config(depth=1)
    state, (tokens, targets) = weights(c), batch(c)
    model, said = made(c, state, "spd", vocabulary_parallel=True), {}
    twin = copy.deepcopy(model)
    before = model(tokens, targets).item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    said["a copy"] = abs(twin(tokens, targets).item() - before) < 1e-6
    twin.double()(tokens, targets).backward()
    parts = [p for p in twin.parameters() if type(p) is PartWeight]
    said["parts after a cast"] = len(parts) == 7
    gradients = twin.gather_gradients()
    true = torch.stack([g.norm() for g in gradients.values()]).norm()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    said["norm to clip by"] = apart(norm, true) < 1e-9
    own = twin.state_dict()
    twin.load_state_dict(own)
    other = {n: 1 - v if n.endswith("extra_state") else v for n, v in own.items()}
    said["another rank's state"] = refusal(twin.load_state_dict, other)
    said["a whole state"] = refusal(twin.load_state_dict, state)
    whole = twin.full_state_dict()
    del whole["head.norm.weight"]
    said["a whole state that lacks one"] = refusal(twin.load_full_state_dict, whole)
    name = "blocks.0.down.weight"
    narrow = {**twin.full_state_dict(), name: state[name][:, :-1]}
    said["a whole state of another width"] = refusal(twin.load_full_state_dict, narrow)
    said["over the vocabulary"] = refusal(twin, tokens + 50) if device().type == "cpu" else "index"
    said["a target over it"] = (
        refusal(twin, tokens, targets + 50) if device().type == "cpu" else "index"
    )
    said["a wider model's state"] = refusal(
        twin.load_full_state_dict, Decoder(config(depth=1, hidden=48)).state_dict()
    )
    own_norm = torch.nn.utils.parametrizations.spectral_norm
    said["a norm of a part"] = refusal(own_norm, twin.blocks[0].out)
    said["all targets ignored"] = twin(tokens, torch.full_like(tokens, -100)).isnan().item()
    return said


def refused():
    """What is said of models that ranks cannot make together."""
    c, said = config(), {}
    for name, changed in (("heads", {"heads": 1}), ("kv_heads", {"kv_heads": 1}),
                          ("hidden", {"hidden": 23})):  # fmt: skip
        said[name] = refusal(TensorParallelDecoder, config(**changed))
    odd = config(vocabulary=63)
    said["vocabulary"] = refusal(TensorParallelDecoder, odd, vocabulary_parallel=True)
    said["plan"] = refusal(TensorParallelDecoder, c, plan=named_plan("spd", 3))
    said["no name"] = refusal(TensorParallelDecoder, c, plan=12)
    said["reduce"] = refusal(TensorParallelDecoder, c, reduce="quick")
    linear = config(linear="dense_single")
    said["linear"] = refusal(TensorParallelDecoder, linear)
    g = torch.Generator().manual_seed(dist.get_rank())
    said["seed"] = refusal(TensorParallelDecoder, c, generator=g)
    model = TensorParallelDecoder(c, generator=torch.Generator().manual_seed(0), device=device())
    tokens, targets = batch(c, seed=dist.get_rank())
    said["tokens"] = refusal(model, tokens)
    said["targets"] = refusal(model, batch(c)[0], targets)
    other = "spd" if dist.get_rank() else "tp"
    g.manual_seed(0)
    said["ranks"] = refusal(TensorParallelDecoder, c, plan=other, generator=g)
    return said


def refusal(function, *args, **options):
    """The text of the error that a call raises, or None."""
    try:
        function(*args, **options)
    except (ValueError, RuntimeError, IndexError) as error:
        return str(error)
    return None


def gate(seed, count):
    """Random models, plans and options against the simulation, in float64; the errors."""
    draw, found = random.Random(seed), {}
    for turn in range(count):
        depth, heads = draw.randint(1, 4), draw.choice((4, 8))
        count_of = draw.randint(0, 2 * depth - 1)
        listed = sorted(draw.sample(range(2 * depth), count_of))
        name = draw.choice(["tp", "spd", str(draw.randint(1, depth)), f"selective:{listed}"])
        name = draw.choice([name, name, f"desync:{name}", "parallel"])
        options = {
            "depth": depth,
            "heads": heads,
            "kv_heads": draw.choice((4, heads)),
            "width": heads * draw.choice((2, 6)),
            "hidden": 4 * draw.randint(1, 9),
            "vocabulary": 4 * draw.randint(3, 20),
            "tied": draw.random() < 0.5,
            "bias": draw.random() < 0.7,
            "rope_base": draw.choice((10000.0, 50.0)),
        }
        more = {
            "vocabulary_parallel": draw.random() < 0.5,
            "checkpoint_blocks": draw.random() < 0.3,
        }
        answer = against_truth(
            config(**options), name, dtype=torch.float64, seed=seed + turn, **more
        )
        found[f"{name} {options} {more}"] = answer
    return found


def losses(plans):
    """The loss of each plan, of the same weights and tokens."""
    c = config()
    return {plan: made(c, weights(c), plan)(*batch(c)).item() for plan in plans}


def apart_on_purpose():
    """What `replicas_apart` says of a new model, and after a rank has changed a scale."""
    c = config()
    model = made(c, weights(c), "spd")
    before = model.replicas_apart()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.blocks[2].mlp_norm.weight.mul_(2)
    return before, model.replicas_apart()


def low_precision(plan):
    """By name, on rank 0: the error of bf16 over that of a simulation in bf16, and its limit."""
    c = config(width=64, hidden=64, context=64, vocabulary=256)
    state = weights(c, dtype=torch.bfloat16)
    wide = {name: value.double() for name, value in state.items()}
    tokens, targets = batch(c, B=8)
    model = made(c, state, plan, vocabulary_parallel=True)
    model(tokens, targets).backward()
    found = {"logits": model(tokens).detach()} | model.gather_gradients()
    if dist.get_rank():
        return {}
    both = []
    for each in (wide, state):
        logits, _, gradients = truth(c, each, plan, dist.get_world_size(), tokens, targets)
        both.append({"logits": logits} | gradients)
    true, simulated = both
    return {
        name: (
            apart(found[name].double(), value) / apart(simulated[name].double(), value),
            limit(2, value.numel()),
        )
        for name, value in true.items()
    }


def wrong_steps():
    """What is said of steps of decoding that cannot be right."""
    c = config(depth=2)
    model, said = made(c, weights(c), "spd"), {}
    token, caches = torch.zeros(2, 1, dtype=torch.int64, device=device()), model.cache(2, 4)
    said["room"] = refusal(model.decode_step, token, caches, 4)
    said["position"] = refusal(model.decode_step, token, caches, torch.tensor(0))
    said["heads"] = refusal(model.decode_step, token, Decoder(c, device=device()).cache(2, 4), 0)
    with torch.autocast(device().type, torch.bfloat16):
        said["dtype"] = refusal(model.decode_step, token, caches, 0)
    model.decode_step(token, caches, 0)
    said["a position left out"] = model.decode_step(token, caches, 2).isnan().all().item()
    return said


def summed(reduce):
    """Errors of plans whose sums go this way, forward and backward; on GPUs."""
    c = config(width=64, hidden=64)
    plans = "tp", "2", "desync:spd"
    return {plan: against_truth(c, plan, reduce=reduce) for plan in plans}


def summed_elsewhere(reduce):
    """`summed` on this rank's GPU, while another one is current."""
    with torch.cuda.device((device().index + 1) % torch.cuda.device_count()):
        return summed(reduce)


def captured(reduce):
    """The error of steps that a CUDA graph holds against the same ones, run one by one."""
    c = config(attention=None, width=256, hidden=64)
    state, (tokens, _) = weights(c, dtype=torch.bfloat16), batch(c)
    model = made(c, state, "spd", vocabulary_parallel=True, reduce=reduce)
    caches, last = model.cache(*tokens.shape), tokens.shape[1] - 1
    for t in range(last + 1):  # the sums of this size are chosen here
        true = model.decode_step(tokens[:, t : t + 1], caches, t)
    token, graph = tokens[:, last:].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = model.decode_step(token, caches, last)
    found.zero_()
    caches.blocks[0][0][:, :, last] = 0  # the graph writes it again
    graph.replay()
    return apart(found, true)
