"""torch.distributed.checkpoint of a model with layers that several ranks hold together.

    import torch.distributed.checkpoint as dcp

    dcp.save(checkpoint.state_dict(model), checkpoint_id=folder)
    checkpoint.load(checkpoint.state_dict(model), folder)      # in place

Tensors of one name on all ranks are replicas to dcp, which writes one of them. What a rank alone
holds has therefore a name of its own, "mlp.0.weight.block_shock.rank0of2"; biases and other modules
keep theirs. The tensors are the model's own memory. A load writes them in place, which raises their
version counters: at its next forward `BlockShock` finds the weight or the codes written, and brings
its compressed forms, also those of another mask, into step. Nothing else is to be called.

A checkpoint is read by as many ranks as wrote it, with the same method and master. To change them,
save the state_dict of the reverted model (`conversion.revert`), which is the dense model's.

An optimizer's state is in part the rank's alone: give all of it the rank's name.

    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state = checkpoint.state_dict(model)
    state["optimizer" + checkpoint.suffix()] = get_optimizer_state_dict(model, optimizer)
"""

import re

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from blockshock.distributed import collectives
from blockshock.linear.split import Split


def state_dict(model: nn.Module) -> dict:
    """The model's state_dict for `dcp.save` and `load`: names as above, the model's own memory."""
    state = model.state_dict()
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, Split) and layer.ranks > 1:
            above, ending = f"{name}." if name else "", f".{_kind(layer)}{suffix(layer.group)}"
            state.pop(f"{above}_extra_state", None)
            own = {"weight": state.pop(f"{above}weight", None)} | layer.mask_state()
            state |= {f"{above}{key}{ending}": value for key, value in own.items()}
    return dict(state)


def _kind(layer: Split) -> str:
    """What a weight of this shape means: the method, its master, and a mask that is no tensor."""
    said = (getattr(layer, "mask", None), getattr(layer, "master", None))
    return "-".join([layer.method, *(t for t in said if isinstance(t, str) and t != "packed")])


def suffix(group=None) -> str:
    """What ends the name of anything that this rank of the group alone holds: ".rank0of2"."""
    return f".rank{collectives.group_rank(group)}of{collectives.group_size(group)}"


def load(state: dict, folder) -> None:
    """`dcp.load` of a folder that `dcp.save` wrote, into the tensors of `state`. A collective.

    Raises ValueError, and has written nothing, where this rank's parts are not in it.
    """
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        reason = _missing(state, dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
        if reason is None:
            raise
        raise ValueError(f"the checkpoint {folder} has no {reason}") from error


def _missing(state: dict, held) -> str | None:
    """The first part of this rank that a checkpoint does not hold, and why; or None."""
    for key in _tensors(state):
        part = re.match(r"(.*)\.rank\d+of\d+(?=\.|$)", key)
        if part is None or key in held:
            continue
        others = re.compile(re.escape(part[1]) + r"\.rank\d+of(\d+)(\.|$)")
        ranks = sorted({match[1] for match in map(others.match, held) if match})
        if part[1].rpartition(".")[0] in held:
            return f"{key!r}, but the whole of it: load that into the model before `convert`"
        if ranks:
            return f"{key!r}, but parts of {' and '.join(ranks)} ranks: load it with as many"
        return f"{key!r}, and no other part of it: it is of another model or method"
    return None


def _tensors(state: dict, above: str = ""):
    """The names by which dcp stores the tensors of dicts in dicts."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{above}{key}.")
        elif isinstance(value, Tensor):
            yield f"{above}{key}"
