"""What ranks run for tests/test_tensor_parallel.py; the tests judge the answers."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

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
