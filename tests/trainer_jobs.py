"""What the ranks do in the tests of trainers; the tests judge the answers."""

import copy
import io
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

import blockshock
from blockshock import sources
from blockshock.distributed import collectives
from blockshock.distributed.ranks import device
from blockshock.linear import METHODS
from blockshock.linear.part import PartGradient, PartWeight
from blockshock.linear.split import Split
from blockshock.measure.errors import relative_error
from tests.outside_jobs import another_group

WIDTH, ROWS = 128, 32


def dtype() -> torch.dtype:
    """Of the converted models: on the CPU, one in which steps hardly round."""
    return torch.bfloat16 if device().type == "cuda" else torch.float64


def net(kind=None, seed=0) -> nn.Module:
    """Layers to convert between such as every rank holds whole."""
    torch.manual_seed(seed)
    layers = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.LayerNorm(2 * WIDTH)
    made = nn.Sequential(*layers, nn.Linear(2 * WIDTH, WIDTH)).bfloat16()
    with torch.no_grad():  # the terms' norms differ: the first two columns of four are larger
        made[1].weight.view(-1, 4)[:, :2] *= 3
    return made.to(device(), kind or dtype())


def pair(method, options, group=None) -> tuple[nn.Module, nn.Module]:
    """(the dense model in float64, the converted one)."""
    own = net()
    blockshock.convert(own, method, group=group, **options)
    return net(torch.float64), own


def batch(seed=1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(ROWS, WIDTH).bfloat16().to(device())


def backward(model, seed=1) -> None:
    x = batch(seed).to(next(model.parameters()).dtype)
    y = model(x)
    (y - x.roll(1, 1)).pow(2).mean().backward()


def parts(model) -> dict[str, Split]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Split)}


def whole(model) -> torch.Tensor:
    """What every rank must hold alike, in one vector."""
    return torch.cat([p.detach().flatten().double() for p in replicated(model)])


def replicated(model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if not isinstance(p, PartWeight)]


def apart(own, true) -> dict[str, float]:
    """How far a converted model's weights and other parameters are from the dense one's."""
    far = {}
    layers = parts(own)
    for name, parameter in true.named_parameters():
        layer, _, kind = name.rpartition(".")
        converted = layer in layers and kind == "weight"
        found = layers[layer].to_dense() if converted else own.get_parameter(name).detach()
        far[name] = relative_error(found, parameter.detach())
    return far


def refusal(function, *args, **kwargs) -> str | None:
    """What it raises: "ValueError: text"; None where it goes through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(*args, **kwargs)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# Norms and scalers


def clipped(method, options, order, foreach):
    """(the dense norm, the converted one), the error of clipped gradients, and equal bits."""
    true, own = pair(method, options)
    for model in (true, own):
        backward(model)
    limit = float(get_total_norm([p.grad for p in true.parameters()], order)) / 10
    norms = [
        clip_grad_norm_(model.parameters(), limit, order, foreach=foreach) for model in (true, own)
    ]
    same = [collectives.same_on_all_ranks(norms[1].view(1))]
    same += [collectives.same_on_all_ranks(p.grad) for p in replicated(own)]
    errors = []
    for name, layer in parts(own).items():
        source = sources.TensorWeight(true.get_submodule(name).weight.grad)
        errors.append(relative_error(layer.weight.grad, layer.restrict(source)["weight"]))
    return [float(norm) for norm in norms], max(errors), all(same)


def normed_elsewhere(method, options):
    """Norms, dense and converted, of the gradients of `autograd.grad` and in a weight's hook."""
    norms = []
    for model in pair(method, options):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
        loss = model(x.to(device(), dtype())).square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        seen = [float(get_total_norm(grads))]
        for layer in (model[1], model[4]):
            layer.weight.register_hook(lambda dw, seen=seen: seen.append(float(dw.norm())))
        loss.backward()
        norms.append(seen)
    return norms


def trained(method, options, steps=10):
    """After clipped steps: errors by parameter, and whether replicated ones have the same bits."""
    models = pair(method, options)
    for model in models:
        sgd = torch.optim.SGD(model.parameters(), 0.5)
        for step in range(steps):
            sgd.zero_grad(set_to_none=step % 2 == 0)
            backward(model, step)
            clip_grad_norm_(model.parameters(), 0.1)
            sgd.step()
    true, own = models
    return apart(own, true), collectives.same_on_all_ranks(whole(own))


def of_two_groups(order):
    """Norms, dense and converted, of layers of two methods and groups, one of them frozen."""
    true, own = net(torch.float64), net()
    blockshock.convert(own, "block_shock", where="1", master="float32")
    blockshock.convert(own, "dense_tp_column", where="4", group=another_group())
    empty = float(clip_grad_norm_(own.parameters(), 1.0, order))
    norms = []
    for model in (true, own):
        model[0].requires_grad_(False)
        backward(model)
        norms.append(float(get_total_norm([p.grad for p in _with_grad(model)], order)))
    return norms, empty


def _with_grad(model):
    return [p for p in model.parameters() if p.grad is not None]


def not_finite(method, options):
    """The norm where one rank's part of a gradient has an infinity, and what is raised."""
    _, own = pair(method, options)
    backward(own)
    if dist.get_rank() == 0:
        parts(own)["1"].weight.grad.view(-1)[0] = float("inf")
    norm = float(get_total_norm([p.grad for p in own.parameters()]))
    raised = refusal(clip_grad_norm_, own.parameters(), 1.0, error_if_nonfinite=True)
    return norm, raised


def norm_of_a_copy():
    """Whether every usual way to a norm of a part's gradient gives the whole one's; refusals."""
    true, own = pair("dense_tp_row", {})
    for model in (true, own):
        backward(model)
    weight, expected = own[1].weight, float(true[1].weight.grad.norm())
    ways = {
        "norm": lambda g: g.norm(),
        "norm of an order": lambda g: torch.norm(g, 2),
        "vector_norm": lambda g: torch.linalg.vector_norm(g.double()),
        "data": lambda g: g.data.norm(2.0),
        "detached": lambda g: g.detach().clone().norm(p=2),
        "moved": lambda g: torch.norm(g.to(torch.float64), p="fro"),
        "in one row": lambda g: g.view(-1).norm(),
        "copied": lambda g: copy.deepcopy(g).norm(),
    }
    far = {name: abs(float(way(weight.grad)) / expected - 1) for name, way in ways.items()}
    weight.grad = weight.grad.as_subclass(torch.Tensor).clone()
    far["assigned"] = abs(float(weight.grad.norm()) / expected - 1)
    refused = {
        "by rows": refusal(lambda: weight.grad.norm(dim=1)),
        "nuclear": refusal(lambda: torch.norm(weight.grad, "nuc")),
        "matrix": refusal(lambda: torch.linalg.matrix_norm(weight.grad)),
        "order 0": refusal(lambda: torch.linalg.vector_norm(weight.grad, 0)),
        "of the weight": refusal(lambda: weight.norm()),
        "of the weights": refusal(lambda: torch._foreach_norm([weight])),
    }
    return far, refused


def still_parts(method, options):
    """Whether a layer's weight knows its group after what makes another parameter of it."""
    _, own = pair(method, options)
    layer, known = parts(own)["1"], {}

    def knows(layer):
        layer.weight.grad = torch.ones_like(layer.weight)
        kind = type(layer.weight), type(layer.weight.grad)
        return kind == (PartWeight, PartGradient) and layer.weight.grad.group is layer.group

    known["built"] = knows(layer)
    known["copied"] = knows(copy.deepcopy(layer))
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    known["loaded by assigning"] = knows(layer)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        known["moved into another parameter"] = knows(layer.to(torch.float16))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    known["saved"] = knows(torch.load(file, weights_only=False))
    layer.weight = held = nn.Parameter(layer.weight.detach().clone())
    known["another parameter"] = knows(layer) and layer.weight is held
    gradient = io.BytesIO()
    torch.save(layer.weight.grad, gradient)
    gradient.seek(0)
    known["a saved gradient"] = type(torch.load(gradient, weights_only=True)) is torch.Tensor
    return known


def scaled(method, options, fused):
    """By step of a scaler: whether each parameter moved, and the scale. Rank 0 overflows first.

    None where no part has float32 gradients on a GPU: the scaler takes no bf16 ones there.
    """
    size = {"device_type": device().type, "ranks": dist.get_world_size()}
    wide = METHODS[method].unsupported(WIDTH, WIDTH, dtype=torch.float32, **size) is None
    own = net(torch.float32 if wide else None)
    blockshock.convert(own, method, **options)
    taken = [p for p in own.parameters() if p.dtype == torch.float32]
    if not any(isinstance(p, PartWeight) for p in taken):
        return None
    adam = torch.optim.AdamW(taken, 0.1, fused=fused)
    scaler, told = torch.amp.GradScaler(device().type, init_scale=2.0**10), []
    for step in range(2):
        adam.zero_grad()
        before = [p.detach().clone() for p in taken]
        x = batch().to(next(own.parameters()).dtype)
        scaler.scale(own(x).float().sum()).backward()
        if step == 0 and dist.get_rank() == 0:
            parts(own)["4"].weight.grad.view(-1)[-1] = float("inf")
        scaler.step(adam)
        scaler.update()
        moved = [not torch.equal(p, q) for p, q in zip(taken, before, strict=True)]
        told.append((moved, scaler.get_scale()))
    return told


# Optimizers


def stepped(name, layers, options, steps=3):
    """By method: how far a part is from the dense weight after the same steps, in units of eps."""
    far = {}
    for method, how in layers:
        torch.manual_seed(0)
        dense = torch.randn(128, 128).to(device(), dtype())
        layer = METHODS[method].from_dense(dense, **how)
        kind = layer.weight.dtype
        weight = nn.Parameter(dense.to(kind))
        optimizers = [getattr(torch.optim, name)([p], **options) for p in (weight, layer.weight)]
        for _ in range(steps):
            gradient = torch.randn(128, 128).to(device(), kind)
            weight.grad = gradient
            layer.weight.grad = layer.restrict(sources.TensorWeight(gradient))["weight"].clone()
            for optimizer in optimizers:
                optimizer.step()
        expected = layer.restrict(sources.TensorWeight(weight.detach()))["weight"]
        error = relative_error(layer.weight.detach(), expected)
        far[f"{method} {how}"] = error / torch.finfo(kind).eps
    return far


def refused_step(name, layers):
    """What an optimizer says of a step on a part, and whether the part is as it was."""
    said = {}
    for method, how in layers:
        layer = METHODS[method].from_dense(torch.randn(128, 128).to(device(), dtype()), **how)
        optimizer = getattr(torch.optim, name)([layer.weight])
        layer.weight.grad = torch.ones_like(layer.weight)
        before = layer.weight.detach().clone()
        closure = (lambda: 1.0,) if name == "LBFGS" else ()
        text = refusal(optimizer.step, *closure)
        said[f"{method} {how}"] = text, torch.equal(before, layer.weight)
    return said


def zero_redundancy():
    """What is said of ZeRO over all ranks: with a part, and without."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    _, own = pair("dense_tp_row", {})
    backward(own)
    said = []
    for chosen in (list(own.parameters()), replicated(own)):
        zero = ZeroRedundancyOptimizer(chosen, torch.optim.SGD, lr=0.1)
        before = parts(own)["1"].weight.detach().clone()
        said.append((refusal(zero.step), torch.equal(before, parts(own)["1"].weight)))
    return said


# Writes of a dense weight


def dense_state(method, options):
    """What a layer says of a dense model's state, loaded without strict, and is as it was."""
    _, own = pair(method, options)
    before = whole(own), parts(own)["1"].weight.detach().clone()
    text = refusal(own.load_state_dict, net(seed=5).state_dict(), strict=False)
    return text, torch.equal(before[1], parts(own)["1"].weight)


def written_off_the_mask(options):
    """How far `masked_split` is from a dense layer whose weight was copied onto every rank."""
    _, own = pair("masked_split", options)
    other = net(seed=5)
    with torch.no_grad():
        own[1].weight.copy_(other[1].weight[:, own[1].term.columns])
        own[1].bias.copy_(other[1].bias)
        x = batch().to(dtype())
        errors = [relative_error(own[1](x), other[1](x))]
    errors.append(relative_error(own[1].to_dense(), other[1].weight.detach()))
    return errors
