"""Putting a method in place of the `nn.Linear` layers of an existing model, and back.

    report = blockshock.convert(model, "block_shock", group=group)
    print(report)            # what was replaced, what was left, and why
    ...
    blockshock.revert(model) # nn.Linear again; its state_dict is the dense model's

Every rank of the group must call both with the same model. The converted model computes the dense
model's outputs and gradients; its own state_dict holds this rank's parts and loads back to the bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import nn

from blockshock.distributed import reduce
from blockshock.linear import METHODS


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
    (a size, a dtype, one rank), that shares its weight with another module, or that is a subclass
    of nn.Linear is left, with the reason. Raises ValueError for an unknown method or option, and
    for a weight that is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself one nn.Linear; use METHODS[method].from_dense")
    wanted = where if callable(where) else lambda name, layer: fnmatch(name, where)
    cls, report = METHODS[method], Conversion(method)
    users = _users_of_weights(model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        reason = "not asked for by `where`" if not wanted(name, layer) else None
        reason = reason or _keep(layer, cls, users, group, options.get("mask"))
        if reason:
            report.left[name] = reason
        else:
            _replace(model, name, _converted(layer, cls, group, options))
            report.replaced.append(name)
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


def _keep(layer: nn.Linear, cls, users: dict[int, int], group, mask) -> str | None:
    """Why a layer stays as it is, or None."""
    if type(layer) is not nn.Linear:
        return f"a subclass of nn.Linear ({type(layer).__name__}), which may be used by its weight"
    if users[id(layer.weight)] > 1:
        return "its weight is shared with another module"
    N, K = layer.weight.shape
    return cls.unsupported(
        N,
        K,
        dtype=layer.weight.dtype,
        device_type=layer.weight.device.type,
        ranks=reduce.group_size(group),
        mask=mask,
    )


def _converted(layer: nn.Linear, cls, group, options) -> nn.Module:
    try:
        new = cls.from_dense(layer.weight, layer.bias, group=group, **options)
    except TypeError as error:
        raise ValueError(f"{cls.__name__} does not take these options: {error}") from None
    new.weight.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        new.bias.requires_grad_(layer.bias.requires_grad)
    return new.train(layer.training)


def _users_of_weights(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by its id."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if isinstance(parameter, torch.Tensor):
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    return users


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
