"""Supermasks for the layers of a whole model, and ordinary layers again.

    report = apply_supermask(model, linear=Settings(block=32, sparsity=0.8), skip=("last_layer",))
    print(report)            # what was covered, what was left, and why
    ...                      # train; set_sparsity(model, cubic(step, ...)) where it grows
    fold(model)              # the masks multiplied in: nn.Linear and nn.Conv2d again

Layers are changed in place. They stay the same objects with the same parameters, so that hooks,
optimizers and other references stay right.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from blockshock.block_sparse import tiles
from blockshock.block_sparse.supermask import COVERED, Settings, Supermask, cover
from blockshock.linear import encoders, replacing
from blockshock.linear.convert import Conversion

FIRST, LAST = "first_block", "last_layer"  # what `skip` takes besides patterns


def apply_supermask(
    model: nn.Module,
    *,
    linear: Settings | None = None,
    conv1x1: Settings | None = None,
    conv: Settings | None = None,
    skip: tuple[str, ...] = (),
) -> Conversion:
    """Covers the nn.Linear and nn.Conv2d layers of `model` with supermasks, in place.

    linear, conv1x1, conv: the settings of linear layers, of 1 × 1 and of larger convolutions; None
    leaves them. skip: layers that are left: globs over their names ("blocks.0.*"), "last_layer"
    (the last nn.Linear or nn.Conv2d of the model), "first_block" (all that is in the first member
    of the first nn.ModuleList or nn.Sequential of several blocks of one class).

    A layer is left, with the reason, if its settings cannot be (a block that leaves no tile), if it
    is of a subclass, computes its weight, shares it with another module, has no values or has a
    forward of its own. The report says so. When all are left, that is a warning, and so is an
    optimizer or a data-parallel wrapper that was made before and so lacks the scores.

    Raises:
        ValueError: nothing to do; one string as `skip`; a pattern of `skip` that fits no layer; no
            chain of blocks for "first_block"; the model is itself a single layer. Nothing is
            changed then.
    """
    if type(model) in COVERED or isinstance(model, Supermask):
        raise ValueError("the model is itself one layer; use SupermaskLinear.from_dense(model)")
    settings = {"linear": linear, "conv1x1": conv1x1, "conv": conv}
    if not any(settings.values()):
        raise ValueError("no settings; give linear=, conv1x1= or conv= the Settings of its layers")
    if isinstance(skip, str):
        raise ValueError(f"skip = {skip!r}: it takes several patterns; give ({skip!r},)")
    report, covered = Conversion("supermask"), []
    users, skipped = replacing.users(model), _skipped(model, skip)
    for name, layer in _layers(model):
        wanted = settings[kind(layer)]
        reason = skipped.get(name) or _why_left(layer, wanted, users)
        if reason:
            report.left[name] = reason
        else:
            covered.append(cover(layer, wanted))
            report.replaced.append(name)
    encoders.avoid_fused(model, covered)
    for name in replacing.holders(
        [layer.weight for layer in covered if layer.scores.requires_grad]
    ):
        warnings.warn(
            f"{name} was made before apply_supermask, so it does not train the scores; make it "
            "after, or give an optimizer them by add_param_group",
            stacklevel=2,
        )
    if not covered:
        warnings.warn(f"apply_supermask changed nothing: {report}", stacklevel=2)
    return report


def supermasks(model: nn.Module) -> Iterator[tuple[str, Supermask]]:
    """The covered layers of a model and their names."""
    return (each for each in model.named_modules() if isinstance(each[1], Supermask))


def set_sparsity(model: nn.Module, sparsity: float) -> None:
    """Sets the sparsity of every covered layer; the next forward has it.

    Raises ValueError, and changes nothing, for a sparsity outside [0, 1), or one that leaves a
    layer no tile.
    """
    layers = dict(supermasks(model))
    for name, layer in layers.items():
        try:
            tiles.kept(math.prod(layer.grid), sparsity)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
    for layer in layers.values():
        layer.sparsity = sparsity


def fold(model: nn.Module) -> list[str]:
    """Multiplies the masks into the weights, in place; returns the names of the layers.

    They are nn.Linear and nn.Conv2d again, with the same outputs to the bit. A fixed weight stays
    one: `requires_grad_()` trains it again. A data-parallel wrapper that was made before waits for
    the scores' gradients: to train on, wrap the model anew.

    Raises ValueError, and changes nothing, for a layer that has no weight of its own to write to:
    it is computed from other parameters, or another module uses it as well.
    """
    found, users = dict(supermasks(model)), replacing.users(model)
    for name, layer in found.items():
        layer.check_weight_is_held(name)
        if users[replacing.place(layer.weight)] > 1:
            raise ValueError(
                f"the weight of {name!r} is shared with another module, which would lose the "
                "dropped tiles; give the layer a copy of it first"
            )
    for layer in found.values():
        layer.fold()
    encoders.restore(model, found.values())
    return list(found)


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All linear layers and 2-D convolutions, also those of subclasses."""
    plain = tuple(COVERED)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, plain)]


def kind(layer: nn.Module) -> str:
    """Which settings of `apply_supermask` are a layer's: "linear", "conv1x1" or "conv"."""
    if isinstance(layer, nn.Linear):
        return "linear"
    return "conv1x1" if layer.kernel_size == (1, 1) else "conv"


def _why_left(layer: nn.Module, settings: Settings | None, users: Counter) -> str | None:
    if isinstance(layer, Supermask):
        return "it has a supermask already; fold it first"
    if settings is None:
        return f"no settings for {kind(layer)} layers"
    if type(layer) not in COVERED:
        return f"a subclass ({type(layer).__name__}), which may be used by its weight"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed (weight_norm, spectral_norm, pruning), not held"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain nn.Parameter"
    if weight.is_meta:
        return "its weight is on the meta device, without values; load the model first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}; a floating dtype is needed"
    if users[replacing.place(weight)] > 1:
        return "its weight is shared with another module, which would lose the dropped tiles"
    if "forward" in vars(layer):
        return "its 'forward' was replaced on the instance"
    try:
        tiles.check(settings.block, settings.sparsity, weight.shape[:2])
    except ValueError as error:
        return str(error)
    return None


def _skipped(model: nn.Module, skip: tuple[str, ...]) -> dict[str, str]:
    """Layer -> why `skip` leaves it."""
    names, found = [name for name, _ in _layers(model)], {}
    for pattern in skip:
        if pattern == LAST:
            fitting = names[-1:]
        elif pattern == FIRST:
            first = _first_block(model)
            fitting = [name for name in names if name == first or name.startswith(f"{first}.")]
        else:
            fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(
                f"skip = {pattern!r} fits no linear layer or convolution; they are "
                f"{', '.join(names) or 'none'}"
            )
        found.update(dict.fromkeys(fitting, f"skipped by {pattern!r}"))
    return found


def _first_block(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            first = module[0]
            if {type(member) for member in module} == {type(first)} and any(first.children()):
                return f"{name}.{next(iter(module._modules))}".lstrip(".")
    raise ValueError(
        "skip = 'first_block': the model has no nn.ModuleList or nn.Sequential of blocks of one "
        "class; give a pattern of its layers' names"
    )
