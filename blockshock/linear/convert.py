"""Putting a method in place of the `nn.Linear` layers of an existing model, and back.

    report = blockshock.convert(model, "block_shock", group=group)
    print(report)            # what was replaced, what was left, and why
    ...
    blockshock.revert(model) # nn.Linear again; its state_dict is the dense model's

Every rank of the group must call both with the same model; they compare it before they change it.
The converted model computes the dense model's outputs and gradients; its own state_dict holds this
rank's parts and loads back to the bit.
"""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from blockshock.distributed import collectives
from blockshock.linear import METHODS, alike, encoders, extras, replacing, trainers
from blockshock.linear.dense import DenseSingle
from blockshock.linear.split import Split

_CLASSES = tuple(METHODS.values())


@dataclass
class Conversion:
    """What `convert`, or another change of a whole model, did.

    replaced: names of layers; left: name -> reason; parameters: old parameter -> new one, for as
    long as somebody holds the old one, as an optimizer does that was made before.
    """

    method: str
    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    parameters: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, repr=False)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} layers are now {self.method}"]
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
    the method's `from_dense`, such as mask="tile_magnitude".

    A layer is left, with the reason, if the method cannot hold it (a size, a dtype, one rank, a
    kernel or sum that is not to be had here, the meta device), if it shares something with another
    module, is a subclass of nn.Linear, has a gradient, or has what acts on it (hooks, a forward of
    its own, buffers, objects as attributes). Plain attributes are carried over. When all are left,
    that is a warning, and so is an optimizer or a DDP wrapper that holds a replaced parameter.

    Raises ValueError, on all ranks, and changes nothing, for an unknown method or option, a `where`
    of another kind, a weight that is not finite, and where the ranks disagree: about a layer, its
    flags, an option, or the bits of a weight. RuntimeError where a rank does not call it.

    At the first calls of a layer its ranks compare x and dY; see `check_inputs`. Where all ranks
    hold the layers, it calls `ignore_in_ddp(model)`.
    """
    cls, report = METHODS.get(method), Conversion(method)
    alone = collectives.group_size(group) == 1 or cls is DenseSingle
    with torch.inference_mode(False), torch.no_grad():
        with alike.together(group, "convert", alone=alone) as facts:
            _check(model, method, options)
            wanted = _wanted(model, cls, where, group, options, report)
            if not alone:
                facts.update(_facts(method, options, wanted, report.left))
        with alike.together(group, "convert", alone=alone):
            built = {
                name: _converted(name, layer, cls, group, options) for name, layer in wanted.items()
            }
    for name, layer in built.items():  # nothing is replaced before all ranks could build all
        replacing.put(model, name, layer)
        report.replaced.append(name)
    encoders.avoid_fused(model, built.values())
    if built and collectives.group_size(group) == collectives.group_size():
        trainers.ignore_in_ddp(model)
    old = [parameter for layer in wanted.values() for parameter in layer.parameters()]
    new = [parameter for layer in built.values() for parameter in layer.parameters()]
    report.parameters.update(zip(old, new, strict=True))
    replacing.warn_of_holders(old, "convert", replacing.OR_PUT)
    if not built:
        warnings.warn(f"convert changed nothing: {report}", stacklevel=2)
    return report


def revert(model: nn.Module) -> list[str]:
    """Makes every converted layer an nn.Linear again, in place; returns their names.

    Weight and bias have the dtype that the layer multiplied in. A collective: every rank of the
    layers' group must call it. Raises ValueError, on all ranks, and changes nothing, where the
    ranks have other layers, or something acts on a converted layer, such as a hook. An optimizer
    or a DDP wrapper that holds its parameters is a warning.
    """
    if isinstance(model, _CLASSES):
        raise ValueError(
            "the model is itself one converted layer, which has no place to put another one in; "
            "build an nn.Linear from its to_dense() and bias"
        )
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _CLASSES)
    }
    _check_reverted(found)
    with torch.inference_mode(False), torch.no_grad():
        plain = {layer: _reverted(layer) for layer in dict.fromkeys(found.values())}
    for name, layer in found.items():
        replacing.put(model, name, plain[layer])
    encoders.restore(model)
    trainers.forget(model)
    replacing.warn_of_holders([p for layer in plain for p in layer.parameters()], "revert")
    return list(found)


def _check(model: nn.Module, method: str, options: dict) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself one nn.Linear; use METHODS[method].from_dense")
    if isinstance(model, _CLASSES):
        raise ValueError("the model is itself one converted layer")
    cls = METHODS[method]
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


def _wanted(model: nn.Module, cls, where, group, options, report) -> dict[str, nn.Linear]:
    """The layers to replace; the report gets the others, with the reason."""
    asked, users, wanted = replacing.asked_by(where), replacing.users(model), {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, _CLASSES):
            report.left[name] = f"it is {layer.method} already; revert it first"
        elif isinstance(layer, nn.Linear):
            reason = None if asked(name, layer) else "not asked for by `where`"
            reason = reason or _why_left(layer, cls, users, group, options)
            if reason:
                report.left[name] = reason
            else:
                wanted[name] = layer
    return wanted


def _why_left(layer: nn.Linear, cls, users: Counter, group, options) -> str | None:
    """Why a layer stays as it is, or None."""
    if reason := replacing.why_left(layer, users):
        return reason
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


def _facts(method: str, options: dict, wanted: dict, left: dict) -> dict[str, dict]:
    """What every rank must have alike: layer -> what -> value."""
    facts = {"the call": {"method": method} | options}
    facts |= {f"layer {name!r}": {"result": f"left, {reason}"} for name, reason in left.items()}
    for name, layer in wanted.items():
        own = {"result": "replaced", "training": layer.training}
        for kind, parameter in layer.named_parameters():
            own[f"shape of {kind}"] = list(parameter.shape)
            own[f"dtype of {kind}"] = str(parameter.dtype)
            own[f"device of {kind}"] = parameter.device.type
            own[f"requires_grad of {kind}"] = parameter.requires_grad
            own[f"bits of {kind}"] = alike.digest(parameter)
        facts[f"layer {name!r}"] = own
    return facts


def _converted(name: str, layer: nn.Linear, cls, group, options) -> nn.Module:
    new = cls.from_dense(layer.weight, layer.bias, group=group, **options)
    new.weight.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        new.bias.requires_grad_(layer.bias.requires_grad)
    if isinstance(new, Split):
        new.check = alike.Check(name)
    extras.carry(layer, new)
    return new.train(layer.training)


def _check_reverted(found: dict[str, nn.Module]) -> None:
    """Raises ValueError where a layer cannot be reverted, or its ranks have others."""
    reasons = {name: extras.acting(layer) for name, layer in found.items()}
    reasons = {name: reason for name, reason in reasons.items() if reason}
    failures = []
    for group in dict.fromkeys(getattr(layer, "group", None) for layer in found.values()):
        try:
            with alike.together(group, "revert") as facts:
                for name, reason in reasons.items():
                    raise ValueError(f"layer {name!r} cannot be reverted: {reason}")
                for name, layer in found.items():
                    if isinstance(layer, Split) and layer.group is group:
                        size = f"[{layer.out_features}, {layer.in_features}]"
                        facts[f"layer {name!r}"] = {"what it is": f"{layer.method} {size}"}
        except ValueError as error:  # the other groups are told as well
            failures.append(error)
    if failures:
        raise failures[0]


def _reverted(layer: nn.Module) -> nn.Linear:
    weight = layer.to_dense()
    N, K = weight.shape
    linear = nn.Linear(K, N, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        bias = layer.bias.detach().to(weight.dtype, copy=True)
        linear.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
    extras.carry(layer, linear)
    return linear.train(layer.training)
