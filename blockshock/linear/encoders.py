"""PyTorch's encoder layers, in eval, hand the weights of their layers to one fused kernel.

Then a layer that stands in such an encoder is never called. `avoid_fused` makes PyTorch call it,
and `restore` undoes that.
"""

from collections.abc import Iterable

from torch import nn

from blockshock.linear import extras

_NESTED = "_nested_before_convert"  # an encoder's flag, for `restore`


def avoid_fused(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Makes every encoder of `model` call these of its layers.

    PyTorch fuses no module that has a hook, and no encoder without nested tensors.
    """
    layers = set(layers)
    for parent in model.modules():
        if isinstance(parent, nn.TransformerEncoderLayer):
            for layer in layers.intersection(parent.children()):
                layer.register_forward_pre_hook(extras.must_be_called)
        if isinstance(parent, nn.TransformerEncoder) and not layers.isdisjoint(parent.modules()):
            if not hasattr(parent, _NESTED):
                setattr(parent, _NESTED, parent.use_nested_tensor)
            parent.use_nested_tensor = False


def restore(model: nn.Module, layers: Iterable[nn.Module] = ()) -> None:
    """Lets PyTorch fuse again, where no other layer than these has to be called.

    layers: those that are ordinary again, and still in the model.
    """
    for layer in layers:
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is extras.must_be_called:
                del layer._forward_pre_hooks[key]
    for encoder in model.modules():
        if hasattr(encoder, _NESTED) and not any(map(_must_be_called, encoder.modules())):
            encoder.use_nested_tensor = getattr(encoder, _NESTED)
            delattr(encoder, _NESTED)


def _must_be_called(layer: nn.Module) -> bool:
    return extras.must_be_called in layer._forward_pre_hooks.values()
