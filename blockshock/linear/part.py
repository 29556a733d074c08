"""A rank's part of a weight, and of the weight's gradient, as tensors that know they are parts.

What is elementwise is right for a part as it is. What needs all of a weight is not: a product with
the part, and a norm of it. Products and norms of a `PartWeight` are refused. Of a `PartGradient`,
two things are made whole, for trainers call them on all ranks:

    norm of dW    the norm of all parts' norms: the parts are disjoint, and together the whole
                  (`torch.nn.utils.clip_grad_norm_` and `get_total_norm` use nothing else)
    finite?       found_inf of `torch.amp.GradScaler`, summed: all ranks skip a step, or none

Both are collectives of the layer's group, and give the same bits on every rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import _foreach_supported_types as _for_optimizers
from torch.utils._foreach_utils import _foreach_supported_types as _for_norms

from blockshock.distributed import collectives

_NORMS = {torch.linalg.vector_norm, torch.norm, Tensor.norm}
_OTHER_NORMS = {torch.linalg.norm, torch.linalg.matrix_norm, torch.renorm, Tensor.renorm}
# Products, and the transposes that precede one.
_PRODUCTS = {
    torch.nn.functional.linear,
    torch.nn.functional.embedding,
    *(getattr(torch, name) for name in ("mm", "mv", "matmul", "addmm", "bmm", "einsum", "t")),
    *(
        getattr(Tensor, name)
        for name in ("mm", "mv", "matmul", "__matmul__", "__rmatmul__", "addmm", "t")
    ),
    *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
}
# The same entries in another tensor.
_SAME = {
    Tensor.data.__get__,
    *(getattr(Tensor, name) for name in ("detach", "clone", "view", "reshape", "flatten")),
    *(getattr(Tensor, name) for name in ("to", "cpu", "float", "double", "half", "bfloat16")),
}
# Other code may hold the memory afterwards, and write it uncounted.
_LENDS = {
    Tensor.data.__get__,
    Tensor.data.__set__,
    torch.detach,
    *(getattr(Tensor, name) for name in ("detach", "view", "reshape", "flatten", "numpy")),
    Tensor.__array__,
}


class PartGradient(Tensor):
    """The gradient of a `PartWeight`. group: of the ranks that hold the other parts.

    A norm of all its entries is the norm of the whole gradient, so every rank must ask for it.
    Raises TypeError for a norm of some dimensions, and ValueError for an order of 0 or less.
    """

    group = None

    @classmethod
    def of(cls, gradient: Tensor, group) -> "PartGradient":
        """The tensor itself, which becomes one."""
        gradient.__class__, gradient.group = cls, group
        return gradient

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _NORMS:
            return _norm(*args, **kwargs)
        if func is torch._foreach_norm:
            return _norms(*args, **kwargs)
        if func in _OTHER_NORMS:
            raise TypeError(_no_whole_norm(func.__name__))
        result = torch._C._disabled_torch_function_impl(func, types, args, kwargs)
        if func is torch._amp_foreach_non_finite_check_and_unscale_:
            gradients, found_inf, _ = args
            for group in _groups(gradients):
                collectives.all_reduce(found_inf, group).clamp_(max=1)  # fused steps ask for 1
        if func in _SAME and type(result) is Tensor and _is_part(args[0]):
            cls.of(result, args[0].group)
        return result

    def __deepcopy__(self, memo: dict) -> "PartGradient":
        """In the same process group, which has no copies."""
        memo[id(self)] = twin = self.clone()
        return twin

    def __reduce_ex__(self, protocol):
        """Saved as a plain tensor: a process group cannot be."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class PartWeight(nn.Parameter):
    """A rank's part of a weight: a parameter to optimizers; products and norms are refused.

    A part of the shape [N, K] would give a wrong Y without a word to code that takes a layer's
    weight and multiplies by itself. Use `layer(x)`, or `layer.to_dense()` for the whole weight.

    group: of the ranks that hold the other parts. grad: None, or a `PartGradient`. values_only:
    nothing is made of its values, such as a mask or a compressed form, that ranks which hold the
    same part must have in common. lent: how often its memory was given away or replaced, or given
    to a grouped or fused kernel that writes. PyTorch's version does not count what is written
    through `.data`, or by such a kernel.
    """

    group, values_only, lent = None, False, 0

    @classmethod
    def of(cls, weight: nn.Parameter, group) -> "PartWeight":
        """The parameter itself, which becomes one; an optimizer may hold it already.

        Raises TypeError for anything else, such as what shards or computes a weight puts there.
        """
        if type(weight) not in (nn.Parameter, cls):
            raise TypeError(
                "the weight of this layer is one rank's part, and takes an nn.Parameter, not "
                f"{type(weight).__name__}; do not shard it again: over the layer's ranks give it "
                "to fully_shard(ignored_params=) or FullyShardedDataParallel(ignored_states=), "
                "and over ranks that hold the same part use DistributedDataParallel"
            )
        weight.__class__, weight.group = cls, group
        return weight

    @property
    def grad(self) -> PartGradient | None:
        """What backward left, which PyTorch makes a plain tensor."""
        gradient = super().grad
        if type(gradient) is Tensor:
            PartGradient.of(gradient, self.group)
        return gradient

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        nn.Parameter.grad.__set__(self, gradient)

    @grad.deleter
    def grad(self) -> None:
        nn.Parameter.grad.__delete__(self)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _PRODUCTS:
            raise RuntimeError(
                "this weight is one rank's part of a layer's weight, and a product with it is no "
                "output of the layer; call the layer, or take the whole weight, `to_dense()`"
            )
        if func in _NORMS or func in _OTHER_NORMS or func is torch._foreach_norm:
            raise TypeError(
                "this weight is one rank's part of a layer's weight, and its norm is not the "
                "weight's; take that of the whole weight, `to_dense()`"
            )
        name = getattr(func, "__name__", "")
        writes = name.startswith(("_foreach_", "_fused_")) and name.endswith("_")
        if writes or func in _LENDS:
            for given in args:
                for tensor in given if isinstance(given, list | tuple) else (given,):
                    if isinstance(tensor, cls):
                        tensor.lent += 1
        return nn.Parameter.__torch_function__(func, types, args, kwargs or {})

    def __deepcopy__(self, memo: dict) -> "PartWeight":
        """In the same process group, which has no copies."""
        memo[id(self)] = twin = PartWeight.of(super().__deepcopy__(memo), self.group)
        return twin

    def __reduce_ex__(self, protocol):
        """Saved as a plain parameter: a process group cannot be."""
        values = nn.Parameter(self.detach(), requires_grad=self.requires_grad)
        return values.__reduce_ex__(protocol)


def replicas(weight: PartWeight, group) -> bool:
    """Whether no two ranks of a group hold different parts of the weight."""
    if not dist.is_initialized():
        return True
    ranks = set(dist.get_process_group_ranks(group))
    return ranks & set(dist.get_process_group_ranks(weight.group)) == {dist.get_rank()}


def check_bias(bias: nn.Parameter | None, group) -> None:
    """Raises TypeError for a bias that is sharded over more ranks than hold the parts."""
    mesh = getattr(bias, "device_mesh", None)  # of a DTensor, half a second to import
    if mesh is not None:
        ranks = set(mesh.mesh.flatten().tolist())
        holders = set(dist.get_process_group_ranks(group))
        if not ranks <= holders:
            raise TypeError(
                f"fully_shard over the ranks {sorted(ranks)} would average the bias of a layer, "
                f"and not its weight, which the ranks {sorted(holders)} hold in parts; use "
                "DistributedDataParallel over ranks that hold the same part"
            )


# As for DTensor: PyTorch's fast paths ask for the type.
_for_optimizers.append(PartWeight)
_for_norms.append(PartGradient)


def _norm(gradient: Tensor, order=None, *some, dtype=None, **options) -> Tensor:
    """`torch.linalg.vector_norm`, `torch.norm` and `Tensor.norm` of all entries."""
    order = options.pop("ord", options.pop("p", order))
    order = 2.0 if order in (None, "fro") else order
    if isinstance(order, str) or any(o not in (None, False) for o in (*some, *options.values())):
        raise TypeError(_no_whole_norm("this norm"))
    return _norms([gradient], order, dtype)[0]


def _norms(tensors: list[Tensor], ord=2.0, dtype=None) -> tuple[Tensor, ...]:
    """`torch._foreach_norm`, where those of parts are of the whole; one gather a group."""
    order = float(ord)
    if not order > 0:
        raise ValueError(f"no norm of order {order} can be made of the norms of parts; use one > 0")
    norms: dict[int, Tensor] = {}
    with torch._C.DisableTorchFunctionSubclass():
        plain = [i for i, tensor in enumerate(tensors) if not _is_part(tensor)]
        if plain:
            own = torch._foreach_norm([tensors[i] for i in plain], order, dtype=dtype)
            norms |= zip(plain, own, strict=True)
        for group in _groups(tensors):
            parts = [i for i, t in enumerate(tensors) if _is_part(t) and t.group is group]
            own = torch.stack([_wide_norm(tensors[i], order) for i in parts])
            of_all = collectives.all_gather(own, group)  # [ranks, parts]
            whole = torch.linalg.vector_norm(of_all, order, dim=0)
            norms |= {i: n.to(dtype or tensors[i].dtype) for i, n in zip(parts, whole, strict=True)}
    return tuple(norms[i] for i in range(len(tensors)))


def _wide_norm(part: Tensor, order: float) -> Tensor:
    """Summed in float32 at least; float64, in which its square has room."""
    wide = torch.promote_types(part.dtype, torch.float32)
    return torch.linalg.vector_norm(part, order, dtype=wide).double()


def _groups(tensors) -> list:
    """The groups of the parts among the tensors, each once, in the order of the tensors."""
    return list({id(t.group): t.group for t in tensors if _is_part(t)}.values())


def _is_part(tensor: Tensor) -> bool:
    return isinstance(tensor, PartGradient)


def _no_whole_norm(name: str) -> str:
    return (
        f"{name} of a gradient of which this rank holds a part is not to be had; take the norm of "
        "all its entries, which is the whole gradient's, on every rank"
    )
