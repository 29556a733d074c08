"""Putting block-sparse layers in place of the pruned `nn.Linear` layers of a model.

    fold(model)                       # ordinary layers, zero in the tiles that were dropped
    report = sparsify(model, "blocks.*", block=64)
    print(report)                     # what was replaced, what was left, and why

The model computes what it did: in "bsr" the same weights, up to the rounding of its products; in
"semi_structured" the largest two of every four of them.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from blockshock.block_sparse import bsr
from blockshock.block_sparse.linear import KERNELS, BlockSparseLinear
from blockshock.block_sparse.semi_structured import SemiStructured
from blockshock.block_sparse.supermask import Supermask
from blockshock.linear import encoders, extras, replacing
from blockshock.linear.convert import Conversion

ANY = (1 << 20, 1 << 20)  # a size that has room for every block and sparsity
STORAGES = {cls.method: cls for cls in (BlockSparseLinear, SemiStructured)}


def sparsify(
    model: nn.Module,
    where: str | Callable[[str, nn.Linear], bool] = "*",
    *,
    storage: str = "bsr",
    block: int = 64,
    sparsity: float | None = None,
    kernel: str = "auto",
    fuse: bool = False,
) -> Conversion:
    """Replaces nn.Linear layers of `model`, in place, by layers that hold their kept tiles alone.

    where: a glob over the layers' names ("*.mlp.*"), or a function of (name, layer). storage: "bsr"
    or "semi_structured". sparsity: prunes each layer now, by the mean of |W| of its tiles; None:
    tiles that are zero are dropped, and layers without any are left. kernel: of "bsr".

    fuse: with "bsr", an nn.ReLU or an exact nn.GELU that follows a replaced layer in an
    nn.Sequential is computed by that layer, and an nn.Identity stands in its place. A model that
    also calls the layer without its activation would compute something else.

    A layer is left, with the reason, if the storage cannot hold it, if it shares something with
    another module, is a subclass of nn.Linear, has a gradient, or has what acts on it (hooks, a
    forward of its own, buffers, objects as attributes). Plain attributes are carried over. When all
    are left, that is a warning, and so is an optimizer or a DDP wrapper that holds a replaced
    parameter.

    Raises ValueError, and changes nothing, for an unknown storage or kernel, a `where` of another
    kind, a block or a sparsity that no layer can have, and a weight that is not finite.
    """
    cls, report = STORAGES.get(storage), Conversion(storage)
    if cls is None:
        raise ValueError(f"unknown storage {storage!r}; use one of {', '.join(STORAGES)}")
    if isinstance(model, nn.Linear | BlockSparseLinear | SemiStructured):
        raise ValueError(f"the model is itself one layer; use {cls.__name__}.from_dense")
    if reason := bsr.unsupported(ANY, block, sparsity):
        raise ValueError(reason)
    if kernel not in KERNELS or (kernel != "auto" and cls is not BlockSparseLinear):
        raise ValueError(f"kernel = {kernel!r}: {', '.join(KERNELS)} with bsr, else auto")
    if fuse and cls is not BlockSparseLinear:
        raise ValueError(f"fuse = True with storage {storage!r}: only bsr has a fused activation")
    options = {"block": block, "sparsity": sparsity}
    if cls is BlockSparseLinear:
        options["kernel"] = kernel
    asked, users, built, old, new = replacing.asked_by(where), replacing.users(model), {}, [], []
    follows = _activations(model, users) if fuse else {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, BlockSparseLinear | SemiStructured):
            report.left[name] = f"it is {layer.method} already"
        elif isinstance(layer, Supermask):
            report.left[name] = "it has a supermask; fold the model first"
        elif isinstance(layer, nn.Linear):
            reason = None if asked(name, layer) else "not asked for by `where`"
            reason = reason or replacing.why_left(layer, users) or _why_left(layer, cls, options)
            if reason:
                report.left[name] = reason
                continue
            own = {"activation": follows[name][1]} if name in follows else {}
            built[name] = made = _built(name, layer, cls, options | own)
            old += layer.parameters()
            new += [made.values] if layer.bias is None else [made.values, made.bias]
    for name, layer in built.items():  # nothing is replaced before all could be built
        replacing.put(model, name, layer)
        if name in follows:
            replacing.put(model, follows[name][0], nn.Identity())
        report.replaced.append(name)
    encoders.avoid_fused(model, built.values())
    report.parameters.update(zip(old, new, strict=True))
    replacing.warn_of_holders(old, "sparsify", replacing.OR_PUT)
    if not built:
        warnings.warn(f"sparsify changed nothing: {report}", stacklevel=2)
    return report


def _activations(model: nn.Module, users: Counter) -> dict[str, tuple[str, str]]:
    """By name of a layer: (name, kind) of the activation that follows it in an nn.Sequential and
    can be computed by it."""
    found = {}
    for name, chain in model.named_modules():
        if type(chain) is not nn.Sequential:
            continue
        # Not named_children, which leaves out a module that stands there again.
        for (one, _), (other, after) in pairwise(chain._modules.items()):
            kind = _kind(after)
            if kind and users[replacing.place(after)] == 1 and extras.acting(after) is None:
                found[f"{name}.{one}".lstrip(".")] = f"{name}.{other}".lstrip("."), kind
    return found


def _kind(module: nn.Module) -> str | None:
    """What the products can compute of an activation, or None."""
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    return "relu" if type(module) is nn.ReLU else None


def _why_left(layer: nn.Linear, cls, options: dict) -> str | None:
    """Why the storage cannot hold a layer, or None."""
    weight = layer.weight
    like = {"dtype": weight.dtype, "device_type": weight.device.type}
    reason = cls.unsupported(*weight.shape, **like, **options)
    reason = reason or bsr.bias_unsupported(weight, layer.bias)
    if reason or options["sparsity"] is not None:
        return reason
    block = options["block"]
    kept = bsr.nonzero(weight, block)
    count, of = int(kept.sum()), kept.numel()
    if count == of:
        return f"none of its {of} tiles of {block} x {block} is zero; prune it, or give sparsity="
    return None if count else "all of its tiles are zero"


def _built(name: str, layer: nn.Linear, cls, options: dict) -> nn.Module:
    try:
        made = cls.from_dense(layer.weight, layer.bias, **options)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from None
    made.values.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        made.bias.requires_grad_(layer.bias.requires_grad)
    with torch.inference_mode(False):
        extras.carry(layer, made, weight="values")
    return made.train(layer.training)
