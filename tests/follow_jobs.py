"""What the ranks do in the tests of how a layer follows its weight; the tests judge the answers."""

import copy
import random

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from blockshock.distributed import collectives
from blockshock.distributed.ranks import device
from blockshock.kernels import pack
from blockshock.linear import METHODS
from blockshock.linear.masters import MASTERS
from blockshock.measure.errors import relative_error

N, K, B = 64, 128, 16


def usual():
    """The dtype of the products, and another one to cast to."""
    cuda = device().type == "cuda"
    return (torch.bfloat16, torch.float16) if cuda else (torch.float32, torch.float64)


def built(**options):
    """A model of one layer, the same on all ranks."""
    torch.manual_seed(0)
    weight, bias = torch.randn(N, K), torch.randn(N)
    to = device(), usual()[0]
    layer = METHODS["block_shock"].from_dense(weight.to(*to), bias.to(*to), **options)
    return nn.Sequential(layer)


def whole(layer):
    """The weight [N, K] in float64 by the parameter's values, not by what is multiplied.

    By `part`, which lends nothing: a frozen layer would be renewed because of the test.
    """
    dtype = layer.packed.values.dtype
    kept = MASTERS[layer.master].kept(layer.part.clone(), layer.codes)
    term = pack.expand(kept.to(dtype).double(), layer.codes)
    return collectives.all_reduce(term, layer.group)


def errors(model, x):
    """(of Y, of dX if x has a gradient) against the parameters as they are."""
    (layer,) = model
    x = x.detach().to(layer.packed.values.dtype)
    weight, bias = whole(layer), layer.bias.detach().to(x.dtype).double()
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        return [relative_error(model(x), x.double() @ weight.t() + bias)]
    x.requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    true = torch.ones(B, N, dtype=torch.float64, device=x.device) @ weight
    return [
        relative_error(y.detach(), x.detach().double() @ weight.t() + bias),
        relative_error(dx, true),
    ]


def average(averaged, model):
    """An update that leaves the versions of parameters as they are, as a GPU's grouped kernel."""
    weights = tuple(averaged.module.parameters())
    with torch.autograd._unsafe_preserve_version_counter(weights):
        averaged.update_parameters(model)


class Life:
    """A model and what may happen to it."""

    def __init__(self, options):
        loads = options.pop("loads", options["mask"])
        self.model, self.other = built(**options), built(**options | {"mask": loads})
        self.ema = None

    def step(self, **how):
        torch.optim.SGD(self.model.parameters(), 0.1, **how).step()

    def backward(self):
        like = {"dtype": self.model[0].packed.values.dtype, "device": device()}
        x = torch.ones(B, K, **like, requires_grad=True)
        self.model(x).square().mean().backward()

    def fused_step(self):
        self.step(fused=True)

    def counted_step(self):
        self.step(foreach=True)

    def fused_training(self):
        self.backward()
        self.step(fused=True)
        self.zero_grad()

    def fused_training_with_a_look_between(self):
        self.backward()
        with torch.no_grad():
            errors(self.model, torch.ones(B, K, device=device()))
        self.step(fused=True)
        self.zero_grad()

    def zero_grad(self):
        self.model.zero_grad()

    def freeze(self):
        self.model.requires_grad_(not self.model[0].weight.requires_grad)

    def frozen_after_fused_training(self):
        self.model.requires_grad_(True)
        self.fused_training()
        self.model.requires_grad_(False)

    def cast(self):
        first, second = usual()
        dtype = self.model[0].packed.values.dtype
        self.model.to(second if dtype == first else first)

    def cast_in_inference_mode(self):
        with torch.inference_mode():
            self.cast()

    def copied(self):
        self.model = copy.deepcopy(self.model)

    def copied_in_inference_mode(self):
        with torch.inference_mode():
            self.copied()

    def loaded(self):
        self.model.load_state_dict(self.other.state_dict())

    def loaded_and_assigned(self):
        state = {name: value.clone() for name, value in self.other.state_dict().items()}
        self.model.load_state_dict(state, assign=True)

    def assigned(self):
        layer = self.model[0]
        layer.weight = nn.Parameter(layer.weight.detach() * 0.5)

    def data_replaced(self):
        self.model[0].weight.data = self.model[0].weight.detach() * 0.5

    def written(self):
        with torch.no_grad():
            self.model[0].weight.mul_(0.5)

    def written_in_inference_mode(self):
        with torch.inference_mode():
            self.model[0].weight.mul_(0.5)

    def averaged(self):
        if self.ema is None:
            self.ema = AveragedModel(self.model, use_buffers=True)
        if self.ema.module[0].weight.dtype == self.model[0].weight.dtype:
            average(self.ema, self.model)


DEEDS = sorted(
    name
    for name, value in vars(Life).items()
    if callable(value) and name not in ("__init__", "step")
)


def lives(options, seed, turns=40):
    """The largest error of random lives, each checked after every deed, and the deeds before it."""
    chance, life, done = random.Random(seed), Life(dict(options)), []
    x = torch.randn(B, K, generator=torch.Generator().manual_seed(seed)).to(device())
    worst = (0.0, [])
    for _ in range(turns):
        done.append(chance.choice(DEEDS))
        getattr(life, done[-1])()
        for parameter in life.model.parameters():  # CUDA's grouped steps read gradients by it
            assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, done
        for model in [life.model] + ([life.ema.module] if life.ema else []):
            mode = chance.choice([torch.enable_grad, torch.no_grad, torch.inference_mode])
            done.append(mode.__name__)
            with mode():
                found = errors(model, x)
            limit = torch.finfo(model[0].packed.values.dtype).eps
            if max(found) / limit > worst[0]:
                worst = (max(found) / limit, list(done))
    return worst


def cast_with_gradients():
    """Whether a float32 master and its gradients are as before a cast of the products."""
    model = built(mask="tile", master="float32").bfloat16()
    x = torch.randn(B, K, device=device(), dtype=torch.bfloat16)
    model(x).square().mean().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    model.half()
    after = [(p.detach(), p.grad) for p in model.parameters()]
    same = [
        torch.equal(a, b)
        for pair in zip(before, after, strict=True)
        for a, b in zip(*pair, strict=True)
    ]
    return [t.dtype for pair in after for t in pair], same, model(x.half()).dtype


class _Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _backward_after(change, layer):
    x = torch.ones(B, K, device=device(), dtype=usual()[0], requires_grad=True)
    y = layer(x)
    change(layer)
    y.sum().backward()


def _functional(layer):
    x = torch.ones(B, K, device=device(), dtype=usual()[0], requires_grad=True)
    others = {name: p.detach() * 2 for name, p in layer.named_parameters()}
    torch.func.functional_call(layer, others, x).sum().backward()


def _mapped(layer):
    torch.func.vmap(layer)(torch.ones(B, K, device=device(), dtype=usual()[0]))


def _parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", _Twice())
    layer(torch.ones(B, K, device=device(), dtype=usual()[0]))


REPLACED = {
    "a new weight": lambda layer: _backward_after(
        lambda own: setattr(own, "weight", nn.Parameter(own.weight.detach() * 2)), layer
    ),
    "an assigned state": lambda layer: _backward_after(
        lambda own: own.load_state_dict(copy.deepcopy(own.state_dict()), assign=True), layer
    ),
    "functional_call": _functional,
    "another shape": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(3, 3))),
    "parametrized": _parametrized,
    "vmap": _mapped,
}


def replaced(method, kind):
    """What is said where the weight of a layer's forward is not the one of its backward."""
    layer = METHODS[method].from_dense(torch.ones(N, K, device=device(), dtype=usual()[0]))
    try:
        REPLACED[kind](layer)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def moved_nowhere(options):
    """Whether all of the layer's memory is where it was after casts that change nothing."""
    (layer,) = model = built(**options)

    def places():
        packed = layer.packed
        forms = [packed, packed.transposed] if packed.has_transpose else [packed]
        return [
            layer.weight.data_ptr(),
            *(t.data_ptr() for f in forms for t in (f.values, f.codes)),
        ]

    before = places()
    model.to(device()).to(usual()[0])
    unmoved = places() == before
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    return unmoved and places() == before


def loaded_by_swapping(method):
    """The type of the weight after a load that swaps tensors."""
    layer = METHODS[method].from_dense(torch.ones(N, K, device=device(), dtype=usual()[0]))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(layer.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return type(layer.weight)
