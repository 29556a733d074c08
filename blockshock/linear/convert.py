"""Putting a method in place of the `nn.Linear` layers of an existing model, and back.

    report = blockshock.convert(model, "block_shock", group=group)
    print(report)            # what was replaced, what was left, and why
    ...
    blockshock.revert(model) # nn.Linear again; its state_dict is the dense model's

Every rank of the group must call both with the same model. The converted model computes the dense
model's outputs and gradients; its own state_dict holds this rank's parts and loads back to the bit.
"""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch

from torch import nn

from blockshock.distributed import collectives
from blockshock.linear import METHODS, ignore_in_ddp


@dataclass
class Conversion:
    """What `convert` did: names of replaced layers, and name -> reason of those left."""

    method: str
    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} linear layers are now {self.method}"]
        lines += [f"  {name}" for name in self.replaced]
        if self.left:
            lines.append(f"{len(self.left)} were left:")
            lines += [f"  {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def convert(
    model: nn.Module,
    method: str,
    *,
    group=None,
    where: str | Callable[[str, nn.Linear], bool] = "*",
    **options,
) -> Conversion:
    """Replaces nn.Linear layers of `model` in place by a method of `blockshock.linear.METHODS`.

    where: a glob over the layers' names ("*.mlp.*"), or a function of (name, layer). options: for
    the method's `from_dense`, such as mask="tile_magnitude". A layer that the method cannot hold
    (a size, a dtype, one rank, a kernel or sum that is not to be had here), that shares something
    with another module, that has hooks, or that is a subclass of nn.Linear is left, with the
    reason; when all are left, that is a warning. Where all ranks hold the layers, it calls
    `ignore_in_ddp(model)`. Raises ValueError, and changes nothing, for an
    unknown method or option, a weight that is not finite, and ranks whose terms are not
    each other's complement.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself one nn.Linear; use METHODS[method].from_dense")
    wanted = where if callable(where) else lambda name, layer: fnmatch(name, where)
    cls, report, users = METHODS[method], Conversion(method), _users(model)
    _check_options(cls, options)
    built = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, nn.Linear):
            continue
        reason = "not asked for by `where`" if not wanted(name, layer) else None
        reason = reason or _keep(layer, cls, users, group, options)
        if reason:
            report.left[name] = reason
        else:
            built[name] = _converted(layer, cls, group, options)
    for layer in built.values():  # nothing is replaced before all could be built
        if hasattr(layer, "check_pair"):
            layer.check_pair()
    for name, layer in built.items():
        _replace(model, name, layer)
        report.replaced.append(name)
    _avoid_fused_encoders(model, built)
    if built and collectives.group_size(group) == collectives.group_size():
        ignore_in_ddp(model)
    if not built:
        warnings.warn(f"convert changed nothing: {report}", stacklevel=2)
    return report


def revert(model: nn.Module) -> list[str]:
    """Makes every converted layer an nn.Linear again, in place; returns their names.

    A collective: every rank of the layers' group must call it.
    """
    classes = tuple(METHODS.values())
    names = [name for name, module in model.named_modules() if isinstance(module, classes)]
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.to_dense()
        linear = nn.Linear(
            weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        linear.bias = layer.bias
        linear.train(layer.training)
        _replace(model, name, linear)
    return names


def _keep(layer: nn.Linear, cls, users: dict[int, int], group, options) -> str | None:
    """Why a layer stays as it is, or None."""
    if type(layer) is not nn.Linear:
        return f"a subclass of nn.Linear ({type(layer).__name__}), which may be used by its weight"
    if "weight" not in layer._parameters:
        return "its weight is computed (weight_norm, spectral_norm), not held"
    if any(users[id(own)] > 1 for own in (layer, *layer._parameters.values()) if own is not None):
        return "it, its weight or its bias is shared with another module"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks, which would be lost"
    N, K = layer.weight.shape
    asked = inspect.signature(cls.unsupported).parameters
    return cls.unsupported(
        N,
        K,
        dtype=layer.weight.dtype,
        device_type=layer.weight.device.type,
        ranks=collectives.group_size(group),
        **{name: value for name, value in options.items() if name in asked},
    )


def _check_options(cls, options: dict) -> None:
    taken = set(inspect.signature(cls.from_dense).parameters) - {"weight", "bias", "group"}
    for name, value in options.items():
        if name not in taken:
            known = ", ".join(sorted(taken)) or "none"
            raise ValueError(f"{cls.__name__} takes no option {name!r}; it takes {known}")
        valid = getattr(cls, f"{name}s", None)  # masks, kernels, reduces
        if valid and value not in valid:
            raise ValueError(
                f"{cls.__name__} has no {name} {value!r}; use one of {', '.join(valid)}"
            )


def _converted(layer: nn.Linear, cls, group, options) -> nn.Module:
    new = cls.from_dense(layer.weight, layer.bias, group=group, **options)
    new.weight.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        new.bias.requires_grad_(layer.bias.requires_grad)
    return new.train(layer.training)


def _users(model: nn.Module) -> Counter[int]:
    """How many names each module and each parameter of the model has, by its id."""
    users = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    users.update(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return users


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _avoid_fused_encoders(model: nn.Module, built: dict[str, nn.Module]) -> None:
    """PyTorch's encoder, in eval, hands its layers' weights to one kernel and never calls them.

    It does so for no module that has a hook, and for no encoder without nested tensors.
    """
    for name, layer in built.items():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            layer.register_forward_pre_hook(_must_be_called)
    new = set(built.values())
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and new & set(encoder.modules()):
            encoder.use_nested_tensor = False


def _must_be_called(layer: nn.Module, args) -> None:
    """Does nothing, and is there."""
