"""What trainers do with data-parallel wrappers in daily use; the tests judge the answers."""

import copy
import io

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

from blockshock.data_parallel import METHODS
from blockshock.distributed.ranks import device
from tests.data_parallel_jobs import (
    SMALL,
    apart,
    backward_and_finish,
    batch,
    loss,
    net,
    own,
    refusal,
    wrap,
)


def made_directly(method, when, fused):
    """How far values are after three steps of an AdamW that the trainer made, or what is said."""
    true, module = net(method), net(method)
    theirs = torch.optim.AdamW(true.parameters(), lr=0.01, eps=1e-4)
    optimizer = None
    if when == "before":
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, eps=1e-4, fused=fused)
    model = METHODS[method](module, **SMALL.get(method, {}))
    try:
        if when == "after":
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4, fused=fused)
        for number in range(3):
            loss(true, batch(number)).backward()
            loss(model, own(batch(number))).backward()
            model.finish_gradient_sync()
            for each in (theirs, optimizer):
                each.step()
                each.zero_grad()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return apart(model.full_state_dict(cpu=True), true.state_dict())


def not_finished(method):
    """What is said of a step without `finish_gradient_sync`, by an optimizer made directly."""
    model = wrap(method)
    sgd = torch.optim.SGD(model.module.parameters(), lr=0.1)
    loss(model, own(batch(0))).backward()
    return refusal(sgd.step)


def whole_matrices(method):
    """What is said of optimizers that need whole parameters, made directly."""
    model = wrap(method)
    loss(model, own(batch(0))).backward()
    model.finish_gradient_sync()
    classes = (torch.optim.Adafactor, torch.optim.LBFGS)
    return [refusal(cls(model.module.parameters()).step, lambda: 0) for cls in classes]


def clipped(method):
    """Errors of torch's norm and of gradients that it clipped, or what is said."""
    true, model = net(method), wrap(method)
    loss(true, batch(0)).backward()
    loss(model, own(batch(0))).backward()
    model.finish_gradient_sync()
    norm = nn.utils.clip_grad_norm_(true.parameters(), 0.1)
    try:
        found = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    except RuntimeError as error:
        return str(error), refusal(nn.utils.clip_grad_norm_, list(model.trained().values()), 0.1)
    sgd, theirs = (torch.optim.SGD(m.parameters(), lr=1.0) for m in (model, true))
    sgd.step()
    theirs.step()
    values = apart(model.full_state_dict(cpu=True), true.state_dict())
    return abs(found / norm - 1).item(), values


def scaled(method):
    """A scaler's steps, of which the second has an infinite gradient on rank 0 alone.

    Whether values changed in each, and the scale after each; or what is said.
    """
    model = wrap(method)
    optimizer = model.optimizer(torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler(device().type, init_scale=8.0)
    seen = []
    for number in range(3):
        before = model.full_state_dict(cpu=True)
        scaler.scale(loss(model, own(batch(number)))).backward()
        model.finish_gradient_sync()
        largest = max(model.trained().values(), key=torch.numel)
        if (number == 1 and dist.get_rank() == 0) or (number == 1 and method != "fully_sharded"):
            largest.grad.view(-1)[0] = torch.inf
        try:
            scaler.step(optimizer)
        except TypeError as error:
            return str(error)
        scaler.update()
        optimizer.zero_grad()
        seen.append((apart(model.full_state_dict(cpu=True), before) > 0, scaler.get_scale()))
    return seen


def copies(method):
    """What is said where the wrapper is averaged or saved, and where its module is."""
    model = wrap(method)
    loss(model, own(batch(0))).backward()
    model.finish_gradient_sync()
    twin = copy.deepcopy(model.module)
    return {
        "average": refusal(AveragedModel, model),
        "save": refusal(torch.save, model, io.BytesIO()),
        "values": apart(dict(twin.named_parameters()), dict(model.module.named_parameters())),
        "forward": refusal(backward, twin),
    }


def backward(module):
    """A backward of a module alone."""
    loss(module, own(batch(0))).backward()


class Normed(nn.Module):
    """A batch norm between two products."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def daily(method):
    """Errors of an uneven accumulation, of two losses and of evaluation, by name."""
    true, model = Normed().to(device()), METHODS[method](Normed().to(device()))
    model.eval()
    torch.manual_seed(1)
    rows = torch.randn(10, 5).to(device())
    calls = []
    model.module.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    # Evaluation's batch norm is the same for any part of the batch.
    true.eval()
    errors = {"eval": (model(rows) - true(rows)).abs().max().item()}
    (true(rows).square().sum() + true(rows).sin().sum()).div(10).backward()
    mine = rows.chunk(dist.get_world_size())[dist.get_rank()]
    first, last = mine[:3], mine[3:]  # three rows and two
    with model.no_sync():
        part = model(first)
        ((part.square().sum() + part.sin().sum()) / len(mine)).backward()
    part = model(last)
    ((part.square().sum() + part.sin().sum()) / len(mine)).backward()
    model.finish_gradient_sync()
    sgd = model.optimizer(torch.optim.SGD, lr=1.0)
    sgd.step()
    torch.optim.SGD(true.parameters(), lr=1.0).step()
    errors["values"] = apart(
        {n: v.float() for n, v in model.full_state_dict(cpu=True).items() if "num" not in n},
        {n: v for n, v in true.state_dict().items() if "num" not in n},
    )
    return errors, len(calls)


def outside_forward():
    """What is said of a penalty on shares."""
    model = METHODS["fully_sharded"](Normed().to(device()))
    penalty = sum(p.norm() for p in model.module.parameters())
    return refusal(backward_and_finish, lambda x: model(x).sum() + penalty, torch.ones(4, 5))
