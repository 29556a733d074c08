"""What the ranks do in the tests of the layers in a user's program; the tests judge the answers."""

import copy
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import blockshock
from blockshock import sources
from blockshock.distributed.ranks import device
from blockshock.linear import METHODS, checkpoint
from blockshock.measure.errors import relative_error

WIDTH, TOKENS, HEADS = 128, 96, 2
CLASSES = tuple(METHODS.values())


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, tokens, width] -> the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def encoder_layer() -> nn.Module:
    """PyTorch's own block, without dropout."""
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **options)


MODELS = {"block": Block, "encoder_layer": encoder_layer}


def usual_dtype() -> torch.dtype:
    """What such a model has on this rank's device."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def built(kind="block", dtype=None, seed=0) -> nn.Module:
    """A model of these values, which every dtype of the tests holds exactly."""
    torch.manual_seed(seed)
    net = MODELS[kind]()
    return net.bfloat16().to(device(), dtype or usual_dtype())


def inputs(dtype=None, seed=1) -> tuple[Tensor, Tensor]:
    """x and the upstream gradient, [4, tokens, width]."""
    torch.manual_seed(seed)
    x, dy = (torch.randn(4, TOKENS, WIDTH).bfloat16().to(device()) for _ in range(2))
    return x.to(dtype or usual_dtype()), dy.to(dtype or usual_dtype())


def gradients(net, x, dy) -> dict[str, Tensor]:
    """The output, and the gradients of x and of each parameter."""
    x = x.detach().clone().requires_grad_()
    net.zero_grad()
    y = net(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in net.named_parameters()}}


def compiled(method, options, backend, steps=4):
    """Whether a compiled model is the eager one in `steps` steps; graphs after each step."""
    torch._dynamo.reset()
    eager = built()
    blockshock.convert(eager, method, **options)
    net, counter = copy.deepcopy(eager), CompileCounterWithBackend(backend)
    fast = torch.compile(net, backend=counter)
    optimizers = [torch.optim.SGD(model.parameters(), 1e-4) for model in (eager, net)]
    errors, graphs = [], []
    for step in range(steps):
        x, dy = inputs(seed=step)
        expected, found = gradients(eager, x, dy), gradients(fast, x, dy)
        found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
        errors.append(max(relative_error(found[name], expected[name]) for name in expected))
        graphs.append(counter.frame_count)
        for optimizer in optimizers:
            optimizer.step()
    return errors, graphs


def autocast(method, weight_dtype, backward_inside):
    """Dtypes of Y and dX under autocast, whether both are those without, and what is refused."""
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    layer = METHODS[method].from_dense(weight.to(device(), weight_dtype))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 256, generator=generator).to(device()).requires_grad_()
    dy = torch.randn(32, 128, generator=generator).to(device())
    with torch.autocast(device().type, dtype=torch.bfloat16):
        y = layer(x)
        if backward_inside:
            y.backward(dy.to(y.dtype))
    if not backward_inside:
        y.backward(dy.to(y.dtype))
    plain = x.detach().to(weight_dtype).requires_grad_()
    dw, layer.weight.grad = layer.weight.grad, None
    expected = layer(plain)
    expected.backward(dy.to(weight_dtype))
    equal = torch.equal(y, expected), torch.equal(x.grad, plain.grad.to(x.dtype))
    equal += (torch.equal(dw, layer.weight.grad),)
    try:
        layer(x.detach().to(torch.float16))
        refused = None
    except ValueError as error:
        refused = str(error)
    return y.dtype, x.grad.dtype, equal, refused


@lru_cache(maxsize=1)
def another_group():
    """A process group of all ranks beside the default one."""
    return dist.new_group()


def loaded(method, options):
    """Whether a layer of another weight computes the saved one's bits after a load, and moved."""
    torch.manual_seed(0)
    group = another_group()
    first, second = (torch.randn(192, 128).to(device(), torch.bfloat16) for _ in range(2))
    x = torch.randn(16, 128).to(device(), torch.bfloat16)
    make = METHODS[method].from_dense
    saved = make(first, torch.ones_like(first[:, 0]), group=group, **options)
    expected = saved(x)
    twin = copy.deepcopy(saved)
    with torch.no_grad():
        saved.weight.zero_()
    equal = {"copy": torch.equal(twin(x), expected) and twin.group is group}
    layer = make(second, torch.zeros_like(second[:, 0]), group=group, **options)
    layer(x)
    layer.load_state_dict(twin.state_dict(), strict=True)
    equal["loaded"] = torch.equal(layer(x), expected)
    equal["weight"] = torch.equal(layer.to_dense(), first)
    kept = layer.weight.dtype
    layer.to(torch.float16).to(torch.bfloat16)
    equal["moved"] = torch.equal(layer(x), expected) and layer.weight.dtype == kept
    if device().type == "cpu":
        wide = layer.float()(x.float())
        equal["widened"] = wide.dtype == torch.float32 and relative_error(wide, expected) < 0.01
        layer.to(torch.bfloat16)
    for factor in (2, 0.5):
        for parameter in layer.parameters():
            parameter.data = factor * parameter.data
        equal[f"times {factor}"] = torch.equal(layer(x), min(2, 2 * factor) * expected)
    x = x.requires_grad_()
    dx = [torch.autograd.grad(net(x).sum(), x)[0] for net in (layer, twin)]
    equal["gradient"] = torch.equal(*dx)
    try:
        layer.load_state_dict({"weight": layer.weight}, strict=True)
        equal["strict"] = False
    except RuntimeError as error:
        equal["strict"] = "which part of the weight" in str(error)
    return equal


def _trained(seed, method, options, steps):
    net = built(seed=seed)
    blockshock.convert(net, method, where="[ud]*", **options)
    adam = torch.optim.Adam(net.parameters(), 0.01)
    return net, adam, [_step(net, adam) for _ in range(steps)]


def _step(net, adam):
    x, dy = inputs()
    adam.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):  # the others' backward adds in any order on GPUs
        y = net(x)
        y.backward(dy)
    adam.step()
    return y.detach()


def checkpointed(folder, method, options):
    """Saves after two steps, loads into another model; whether output and next steps are equal."""
    net, adam, _ = _trained(0, method, options, 2)
    x, _ = inputs()
    name = "optimizer" + checkpoint.suffix()
    state = {"model": checkpoint.state_dict(net), name: get_optimizer_state_dict(net, adam)}
    dcp.save(state, checkpoint_id=folder)
    other, other_adam, _ = _trained(5, method, options, 1)
    state = {"model": checkpoint.state_dict(other)}
    state[name] = get_optimizer_state_dict(other, other_adam)
    checkpoint.load(state, folder)
    set_optimizer_state_dict(other, other_adam, state[name])
    equal = [torch.equal(net(x), other(x))]
    equal += [torch.equal(_step(net, adam), _step(other, other_adam)) for _ in range(2)]
    equal.append(torch.equal(net.up.to_dense(), other.up.to_dense()))
    return equal, sorted(state["model"])


def wrong_checkpoints(folder):
    """What is said of a checkpoint of other ranks, of another method and of the dense model."""
    net = built()
    dcp.save(net.state_dict(), checkpoint_id=f"{folder}/dense")
    blockshock.convert(net, "block_shock")
    own = checkpoint.state_dict(net)
    ending = ".block_shock" + checkpoint.suffix()
    size = dist.get_world_size()
    renamed = {key.replace(f"of{size}", f"of{2 * size}"): value for key, value in own.items()}
    dcp.save(renamed, checkpoint_id=f"{folder}/ranks")
    other = built()
    blockshock.convert(other, "masked_split")
    dcp.save(checkpoint.state_dict(other), checkpoint_id=f"{folder}/method")
    texts, before = {}, net.up.weight.detach().clone()
    for kind in ("ranks", "method", "dense"):
        try:
            checkpoint.load({key: own[key] for key in own if "up" in key}, f"{folder}/{kind}")
        except ValueError as error:
            texts[kind] = str(error)
    return texts, ending, torch.equal(before, net.up.weight)


def real_block(kind, method, options, steps=3):
    """Errors of (converted, dense) against float64: Y, every gradient, the change after steps."""
    nets = {"true": built(kind, torch.float64), "dense": built(kind), "own": built(kind)}
    report = blockshock.convert(nets["own"], method, **options)
    layers = {
        f"{name}.weight": layer
        for name, layer in nets["own"].named_modules()
        if isinstance(layer, CLASSES)
    }
    found = {}
    for role, net in nets.items():
        x, dy = inputs(torch.float64 if role == "true" else None)
        start = {name: p.detach().clone() for name, p in net.named_parameters()}
        found[role] = gradients(net, x, dy)
        sgd = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        for _ in range(steps):
            net.zero_grad()
            net(x).backward(dy)
            sgd.step()
        for name, parameter in net.named_parameters():
            found[role][f"{name} moved"] = parameter.detach().double() - start[name].double()
        with torch.no_grad():
            found[role]["eval"] = net.eval()(x)
    errors = {}
    for name, value in found["own"].items():
        true, dense = found["true"][name], found["dense"][name]
        layer = layers.get(name.removesuffix(" moved"))
        if layer is not None:
            true, dense = (
                layer.restrict(sources.TensorWeight(full))["weight"] for full in (true, dense)
            )
        errors[name] = relative_error(value, true), relative_error(dense, true)
    return errors, report.replaced, report.left


def in_an_encoder(mask_tokens):
    """How far nn.TransformerEncoder in eval is from the dense one, converted and reverted."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True}
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **options)
    net = nn.TransformerEncoder(layer, 2).to(device()).eval()
    x, _ = inputs(torch.float32)
    away = torch.zeros(x.shape[:2], dtype=torch.bool, device=device())
    away[:, TOKENS - mask_tokens :] = mask_tokens > 0
    answers = []
    with torch.no_grad():
        answers.append(net(x, src_key_padding_mask=away if mask_tokens else None))
        blockshock.convert(net, "dense_tp_row")
        answers.append(net(x, src_key_padding_mask=away if mask_tokens else None))
        blockshock.revert(net)
        answers.append(net(x, src_key_padding_mask=away if mask_tokens else None))
    kept = ~away
    return [relative_error(y[kept], answers[0][kept]) for y in answers[1:]]
