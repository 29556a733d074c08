"""Collectives on partial results, timed as regions.

A collective wants contiguous memory. Where a tensor must be copied for that reason alone, the copy
is a `layout_fix` region with its bytes, so that its cost can be read off every result.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from blockshock.measure.regions import region

# torch 2.13 renamed them and deprecates the old names; 2.10 to 2.12 have only the old ones.
all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group=None) -> int:
    """Ranks in the group (None: the default one); 1 without a process group."""
    if not dist.is_initialized():
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("this rank is not in the process group it was given; use a group it is in")
    return size


def group_rank(group=None) -> int:
    """This rank's place in the group; 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def all_reduce(partial: Tensor, group=None) -> Tensor:
    """The sum of the ranks' partials, the same bits on every rank; overwrites `partial`.

    If `partial` is not contiguous it is copied first (region `layout_fix`).
    """
    if group_size(group) == 1:
        return partial
    partial = fix_layout(partial)
    with region("allreduce", bytes=partial.nbytes):
        dist.all_reduce(partial, group=group)
    return partial


def all_gather(part: Tensor, group=None) -> Tensor:
    """The ranks' equal parts, stacked in rank order: [...] -> [ranks, ...]."""
    ranks = group_size(group)
    if ranks == 1:
        return part.unsqueeze(0)
    part = fix_layout(part)
    gathered = part.new_empty(ranks * part.shape[0], *part.shape[1:])
    with region("allgather", bytes=gathered.nbytes):
        all_gather_tensor(gathered, part, group=group)
    return gathered.view(ranks, *part.shape)


def start_all_gather(part: Tensor, group=None) -> tuple[Tensor, dist.Work]:
    """`all_gather` of a contiguous part, begun: the result is there after work.wait()."""
    ranks = group_size(group)
    gathered = part.new_empty(ranks * part.shape[0], *part.shape[1:])
    work = all_gather_tensor(gathered, part, group=group, async_op=True)
    return gathered.view(ranks, *part.shape), work


def all_gather_into(full: Tensor, part: Tensor, group=None) -> None:
    """Fills full [ranks * n] with the ranks' parts [n], which may be this rank's place in it."""
    with region("allgather", bytes=full.nbytes):
        all_gather_tensor(full, part, group=group)


def reduce_scatter_into(part: Tensor, partial: Tensor, group=None) -> None:
    """Fills part [n] with this rank's place in the sum of the ranks' partials [ranks * n]."""
    with region("reduce_scatter", bytes=partial.nbytes):
        reduce_scatter_tensor(part, partial, group=group)


def fix_layout(tensor: Tensor) -> Tensor:
    """A contiguous tensor for a collective; the copy, if one is made, is a `layout_fix` region."""
    if tensor.is_contiguous():
        return tensor
    with region("layout_fix", bytes=tensor.nbytes):
        return tensor.contiguous()


def same_on_all_ranks(tensor: Tensor, group=None) -> bool:
    """Whether every rank holds the same bits. A collective; the answer is the same everywhere."""
    if group_size(group) == 1:
        return True
    words = tensor.detach().contiguous().flatten().view(torch.uint8)
    return bool(all(torch.equal(words, other) for other in all_gather(words, group)))
