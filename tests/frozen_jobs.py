"""What the ranks do in the tests of frozen layers; the tests judge the answers."""

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from blockshock.distributed.ranks import device
from blockshock.measure.errors import relative_error
from tests.follow_jobs import B, K, average, built, errors, usual


def frozen_average(options):
    """Errors of an average of frozen models, after each of its updates."""
    model = built(**options).requires_grad_(False)
    averaged, found = AveragedModel(model), []
    x = torch.randn(B, K, generator=torch.Generator().manual_seed(0)).to(device())
    for _ in range(3):
        average(averaged, model)
        found += errors(averaged.module, x)
        with torch.no_grad():
            model[0].weight.mul_(-2)
    return max(found) / torch.finfo(usual()[0]).eps


def renewals(options):
    """How often a frozen layer is renewed at first, after its weight was read, and was taken."""
    (layer,) = model = built(**options).requires_grad_(False)
    x, found = torch.randn(B, K, device=device()).to(usual()[0]), []
    upkeep = type(layer).upkeep

    def forward():
        made = []
        layer.upkeep = lambda: made.append(upkeep(layer))
        model(x)
        found.append(len(made))

    for take in (
        lambda: None,
        lambda: [x.to(layer.weight), layer.weight.clone(), layer.to_dense()],
        lambda: layer.weight.data,
        lambda: torch._foreach_neg_([layer.weight]),
    ):
        take()
        forward()
        forward()
    return found


def _called_with(layer, weight):
    """Y of a layer by a weight that lives for one call: the next one may have its memory."""
    x = torch.ones(B, K, device=device(), dtype=usual()[0])
    return torch.func.functional_call(layer, {"weight": weight}, x)


def called_with_weights(options):
    """The error of `functional_call` with several weights in turn, over the rounding."""
    layer = built(**options).requires_grad_(False)[0]
    with torch.no_grad():
        layer.bias.zero_()
    y = _called_with(layer, layer.part.clone())
    found = [
        relative_error(_called_with(layer, layer.part * 2.0**i), y.double() * 2.0**i)
        for i in range(1, 4)
    ]
    return max(found) / torch.finfo(usual()[0]).eps


def _by_vector(layer, vector):
    vector.mul_(-2)
    nn.utils.vector_to_parameters(vector, [layer.weight])


def _by_detached(layer, _):
    with torch.autograd._unsafe_preserve_version_counter((layer.weight,)):
        torch.detach(layer.weight).mul_(-2)


def _by_array(layer, _):
    array = np.asarray(layer.weight)
    array *= -2


def _by_numpy(layer, _):
    array = layer.weight.numpy()
    array *= -2


WRITES = {
    "a vector of parameters": _by_vector,
    "data": lambda layer, _: layer.weight.data.mul_(-2),
    "torch.detach": _by_detached,
    "numpy": _by_numpy,
    "an array": _by_array,
}


def written_uncounted(options, kind):
    """The error of a frozen layer after writes that PyTorch does not count, over the rounding."""
    (layer,) = model = built(**options).requires_grad_(False)
    vector, found = layer.part.clone().flatten(), []
    x = torch.randn(B, K, generator=torch.Generator().manual_seed(0)).to(device())
    for _ in range(3):
        WRITES[kind](layer, vector)
        found += errors(model, x)
    return max(found) / torch.finfo(usual()[0]).eps


def frozen_and_loaded(options):
    """Whether all that a graph of a frozen layer reads is what was loaded, before any forward."""
    (layer,) = model = built(**options)
    model.requires_grad_(False)
    packed = layer.packed
    forms = [packed, packed.transposed] if packed.has_transpose else [packed]
    before = [form.values.clone() for form in forms]
    state = model.state_dict()
    model.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in state.items()})
    return [torch.equal(form.values, 2 * was) for form, was in zip(forms, before, strict=True)]
