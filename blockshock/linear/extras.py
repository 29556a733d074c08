"""What a linear layer has besides its weight and bias, and what becomes of it in another layer.

Plain values that others have put on a layer or a parameter are carried over. With anything else,
which acts on the layer or on its gradients, the layer cannot be replaced.
"""

import enum

import torch
from torch import Tensor, nn

_KNOWN = set(vars(nn.Linear(1, 1, device="meta")))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMES = ", ".join(map(str, DTYPES))
_PLAIN = (bool, int, float, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)
_GONE = object()


def why_not(layer: nn.Linear) -> str | None:
    """Why another layer cannot stand for this nn.Linear, or None."""
    if type(layer) is not nn.Linear:
        return f"a subclass of nn.Linear ({type(layer).__name__}), which may be used by its weight"
    if "weight" not in layer._parameters:
        return "its weight is computed (weight_norm, spectral_norm, pruning), not held"
    for name, parameter in _parameters(layer):
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}, not a plain nn.Parameter"
        if parameter.is_meta:
            return f"its {name} is on the meta device, without values; load the model first"
        if parameter.dtype not in DTYPES:
            return f"its {name} is {parameter.dtype}; it must be one of {_NAMES}"
        if parameter.grad is not None:
            return f"its {name} has a gradient, which would be lost; call zero_grad() first"
    return acting(layer) or _unknown(layer)


def acting(layer: nn.Module) -> str | None:
    """What acts on this layer and would be lost with it, or None."""
    for name, value in vars(layer).items():
        if name.endswith("_hooks") and any(f not in _OURS for f in value.values()):
            return f"it has hooks ({name[1:]}), which would be lost"
        if callable(value) and hasattr(type(layer), name):
            return f"its {name!r} was replaced on the instance"
    for kind in ("buffers", "modules", "parameters"):
        more = [name for name in vars(layer)[f"_{kind}"] if name not in ("weight", "bias")]
        if more:
            return f"it has {kind} of its own, which would be lost: {', '.join(more)}"
    for name, parameter in _parameters(layer):
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"its {name} has hooks, which would be lost"
    return None


def carry(old: nn.Module, new: nn.Module, weight: str = "weight") -> None:
    """Gives the new layer, its weight and its bias the plain values that were put on the old ones.

    weight: what the new layer calls its weight. Raises ValueError where it has another use for a
    name.
    """
    values, called = _extra(old), {"weight": weight, "bias": "bias"}
    for (owner, name), value in values.items():
        if not owner and hasattr(new, name):
            raise ValueError(
                f"the layer has an attribute {name!r}, which {type(new).__name__} has as well; "
                "remove or rename it"
            )
        setattr(getattr(new, called[owner]) if owner else new, name, value)
    if type(new) is not nn.Linear:
        new.carried = tuple(values)


def must_be_called(layer: nn.Module, args) -> None:
    """A hook that does nothing: PyTorch calls a layer that has one, where it else would not."""


_OURS = (must_be_called,)


def _extra(layer: nn.Module) -> dict[tuple[str, str], object]:
    """The values that others put on a layer ("") and its parameters: (owner, name) -> value."""
    owners = {"": layer, **dict(_parameters(layer))}
    if type(layer) is nn.Linear:
        found = ((owner, name) for owner, values in owners.items() for name in vars(values))
        names = [(owner, name) for owner, name in found if owner or name not in _KNOWN]
    else:
        names = [(owner, name) for owner, name in getattr(layer, "carried", ()) if owner in owners]
    values = {(owner, name): vars(owners[owner]).get(name, _GONE) for owner, name in names}
    return {place: value for place, value in values.items() if value is not _GONE}


def _unknown(layer: nn.Linear) -> str | None:
    """What cannot be carried over, or None."""
    for (owner, name), value in _extra(layer).items():
        if not _plain(value):
            of = f"its {owner}" if owner else "it"
            return f"{of} has an attribute {name!r} ({type(value).__name__}), which may act on it"
    return None


def _parameters(layer: nn.Module) -> list[tuple[str, Tensor]]:
    both = ((name, layer._parameters.get(name)) for name in ("weight", "bias"))
    return [(name, parameter) for name, parameter in both if parameter is not None]


def _plain(value) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, (*value, *value.values())))
    return isinstance(value, _PLAIN)
