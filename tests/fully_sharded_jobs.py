"""What the ranks do in the tests of sharded models; the tests judge the answers."""

from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

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
            (found[n].double() - t.double()).abs().max() / t.double().abs().max().clamp(min=1e-3)
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
