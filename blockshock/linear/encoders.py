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


def restore(model: nn.Module) -> None:
    """Lets PyTorch fuse again, as before `avoid_fused`."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is extras.must_be_called:
                del module._forward_pre_hooks[key]
        if hasattr(module, _NESTED):
            module.use_nested_tensor = getattr(module, _NESTED)
            delattr(module, _NESTED)
