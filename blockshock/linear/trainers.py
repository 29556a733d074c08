"""What trainers do to a whole model, refused where it would be wrong for a rank's part of a weight.

PyTorch is asked to call back where a module is put into DistributedDataParallel, before that has
sent anything, and before an optimizer's step.

    DistributedDataParallel over ranks D, layer over ranks G:
        a part that is synchronised    D and G have only this rank in common (data parallel beside
                                       the layer's ranks); the others of D hold the same part
        a part that is ignored         D is within G: no other rank of D holds this part
    optimizers that need all of a weight, or that send parameters to all ranks, or whose state
    would be made inside a CUDA graph
"""

import json
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from blockshock.distributed import agree, collectives
from blockshock.linear.part import PartWeight
from blockshock.linear.split import Split

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks
# By the names of their classes: most are not PyTorch's.
_OF_WHOLE_WEIGHTS = {
    "Adafactor", "CAME", "DistributedShampoo", "LAMB", "LARS", "LBFGS", "Lamb", "Lars", "Muon",
    "SOAP", "Shampoo",
}  # fmt: skip


def ignore_in_ddp(model: nn.Module) -> None:
    """Before DistributedDataParallel(model): leaves the parts of weights to their layers.

    For a process_group of ranks that hold other parts of the same weights. `convert` has done it
    for the model it was given, where all ranks there are hold the layers together. Over ranks that
    hold the same part it is wrong, and refused: gradients would not be averaged.
    """
    names = getattr(model, _IGNORED, ())
    if not isinstance(names, _Ignored):
        setattr(model, _IGNORED, _Ignored(model, names))


def forget(model: nn.Module) -> None:
    """Undoes `ignore_in_ddp`, once no layer is left whose part it was for."""
    names = vars(model).get(_IGNORED)
    if isinstance(names, _Ignored) and not _parts(model):
        delattr(model, _IGNORED)
        if names.names:
            setattr(model, _IGNORED, names.names)


class _Ignored:
    """The names of a model's parts when it is wrapped, and others."""

    def __init__(self, model: nn.Module, names):
        self.model, self.names = model, tuple(names)

    def __iter__(self) -> Iterator[str]:
        yield from self.names
        yield from _parts(self.model)


def _parts(model: nn.Module) -> dict[str, PartWeight]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if isinstance(p, PartWeight)}


def _check_ddp(outer: nn.Module, _: str, model: nn.Module) -> None:
    """Raises ValueError where DistributedDataParallel would put other values in place of a part."""
    if not isinstance(outer, DistributedDataParallel):
        return
    parts = _parts(model)
    for name, weight in parts.items():
        _check_ranks(name, weight, outer.process_group, name in outer.parameters_to_ignore)
    if any(name not in outer.parameters_to_ignore for name in parts):
        _check_same(model, outer.process_group)


def _check_ranks(name: str, weight: PartWeight, group, ignored: bool) -> None:
    ranks = set(dist.get_process_group_ranks(group))
    holders = set(dist.get_process_group_ranks(weight.group))
    wrong = None
    if ignored and not ranks <= holders:
        wrong = "it is to be ignored, so its gradient would not be averaged"
    elif not ignored and ranks & holders != {dist.get_rank()}:
        wrong = "one rank's part would be put in the place of the others'"
    if wrong is None:
        return
    fix = "give process_group= the ranks that hold the same part, and do not ignore it"
    if ranks <= holders:
        fix = "call `blockshock.ignore_in_ddp(model)` first"
    raise ValueError(
        f"DistributedDataParallel over the ranks {sorted(ranks)}: the ranks {sorted(holders)} hold "
        f"parts of {name!r}, and {wrong}; {fix}"
    )


def _check_same(model: nn.Module, group) -> None:
    """Raises ValueError where ranks have another part, or one of another mask. A collective."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Split)}
    own = {name: [layer.part_of(), layer.mask_digests()] for name, layer in layers.items()}
    told = agree.told_by_all(json.dumps(own), group, about="DistributedDataParallel of a model")
    for rank, text in enumerate(told):
        other = json.loads(text)
        for name in own:
            if other.get(name) != json.loads(told[0]).get(name):
                raise ValueError(
                    f"DistributedDataParallel: rank {rank} of its group holds another part of "
                    f"{name!r} than rank 0, or one of another mask; give process_group= the ranks "
                    "that hold the same part, of models that were alike when they were converted"
                )


def _check_step(optimizer: Optimizer, args, kwargs) -> None:
    """Raises ValueError before a step that would not be the dense model's."""
    kind = type(optimizer).__name__
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    needs_whole, sends = names & _OF_WHOLE_WEIGHTS, "ZeroRedundancyOptimizer" in names
    captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if not (needs_whole or sends or captured):
        return
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if not isinstance(parameter, PartWeight) or collectives.group_size(parameter.group) == 1:
            continue
        if captured and not optimizer.state.get(parameter) and _has_state(optimizer):
            raise RuntimeError(
                f"{kind} would make its state in the CUDA graph that is being captured, and every "
                "replay would begin it anew; run one whole step before the capture"
            )
        if not (needs_whole or sends):
            continue
        if needs_whole:
            raise ValueError(
                f"{kind} needs all of a weight, and this rank holds a part of one; use an "
                "elementwise optimizer for the converted layers, such as SGD or AdamW"
            )
        ranks = set(dist.get_process_group_ranks(optimizer.process_group))
        if ranks & set(dist.get_process_group_ranks(parameter.group)) != {dist.get_rank()}:
            raise ValueError(
                f"{kind} over the ranks {sorted(ranks)} would put one rank's part of a weight in "
                "the place of the others'; give the weights of converted layers an optimizer of "
                "their own"
            )


def _has_state(optimizer: Optimizer) -> bool:
    return any(group.get("momentum", True) for group in optimizer.param_groups)


register_module_module_registration_hook(_check_ddp)
register_optimizer_step_pre_hook(_check_step)
