"""What the ranks do in the tests of models in wrappers that synchronise or shard them."""

from functools import lru_cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import blockshock
from blockshock.distributed.ranks import device
from blockshock.linear.part import PartWeight
from blockshock.measure.errors import relative_error
from tests.trainer_jobs import apart, backward, batch, dtype, net, pair, parts, refusal


def _steps(models, seeds, steps=3):
    """seeds: of the batches that each model's gradient is the mean over."""
    for model, own_seeds in zip(models, seeds, strict=True):
        # In groups of their own: a grouped step takes no mix of tensors and fully_shard's DTensors.
        own = [p for p in model.parameters() if isinstance(p, PartWeight)]
        rest = [p for p in model.parameters() if not isinstance(p, PartWeight)]
        sgd = torch.optim.SGD([{"params": kind} for kind in (own, rest) if kind], 1.0, foreach=True)
        for step in range(steps):
            sgd.zero_grad()
            for seed in own_seeds:
                backward(model, 100 * step + seed)
            for parameter in model.parameters():
                if len(own_seeds) > 1:
                    parameter.grad /= len(own_seeds)
            sgd.step()


def in_ddp(method, options, **ddp):
    """Errors of a converted model that trains in DDP over the ranks of its layers."""
    true, own = pair(method, options)
    _steps((true, DistributedDataParallel(own, **ddp)), ([1], [1]))
    return apart(own, true)


def not_asked_to_ignore(method, options):
    """What DDP over the layers' ranks says of parts it was not told of; are they as before?"""
    _, own = pair(method, options)
    outer = nn.Sequential(own)
    before = [p.detach().clone() for p in own.parameters()]
    text = refusal(DistributedDataParallel, outer)
    untouched = all(torch.equal(p, q) for p, q in zip(own.parameters(), before, strict=True))
    blockshock.ignore_in_ddp(outer)
    after = refusal(DistributedDataParallel, outer)
    blockshock.revert(own)
    model = DistributedDataParallel(own)  # dense again: all of it is synchronised
    return text, untouched, after, sorted(model.parameters_to_ignore)


@lru_cache(maxsize=1)
def grid():
    """Four ranks in two rows: those of a row hold a model together, the rows are replicas."""
    return init_device_mesh(device().type, (2, 2), mesh_dim_names=("replica", "part"))


def in_two_dimensions(method, options):
    """Errors of a model that each row of the grid holds, in DDP over the replicas."""
    mesh = grid()
    true, own = pair(method, options, mesh.get_group("part"))
    if mesh.get_local_rank("replica"):
        with torch.no_grad():  # what DDP overwrites
            for parameter in own.parameters():
                parameter.mul_(2)
    model = DistributedDataParallel(own, process_group=mesh.get_group("replica"))
    _steps((true, model), ([0, 1], [mesh.get_local_rank("replica")]))
    return apart(own, true)


@lru_cache(maxsize=1)
def across():
    """The group of this rank where other parts are paired: ranks 0 and 3, or 1 and 2."""
    groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    return groups[dist.get_rank() in (1, 2)]


def wrong_in_two_dimensions(method, options):
    """What DDP says over all ranks, over ranks of other parts, and where replicas are ignored."""
    mesh, said = grid(), {}
    replica, part = mesh.get_group("replica"), mesh.get_group("part")

    def wrap(group, ignored=False, seed=0, **other):
        own = net(seed=seed)
        blockshock.convert(own, method, group=part, **(options | other))
        if ignored:
            blockshock.ignore_in_ddp(own)
        return refusal(DistributedDataParallel, own, process_group=group)

    said["right"] = wrap(replica)
    said["right, ignored"] = wrap(part, ignored=True)
    said["all ranks"] = wrap(None)
    said["all ranks, ignored"] = wrap(None, ignored=True)
    said["replicas, ignored"] = wrap(replica, ignored=True)
    said["own ranks"] = wrap(part)
    said["other parts"] = wrap(across())
    if method in ("block_shock", "masked_split"):
        seed = mesh.get_local_rank("replica")
        said["other masks"] = wrap(replica, seed=seed, mask="magnitude")
    return said


def fully_sharded(method, options):
    """What fully_shard says of a part; and errors of a model where it is left alone."""
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    true, own = pair(method, options)
    text = refusal(fully_shard, own, mesh=mesh)
    true, own = pair(method, options)
    ignored = {m.weight for m in parts(own).values()}
    ignored |= {p for p in own.parameters() if p.dtype != dtype()}  # a wide master's bias
    fully_shard(own, mesh=mesh, ignored_params=ignored)
    _steps((true, own), ([1], [1]))
    far = {n: relative_error(m.to_dense(), true.get_submodule(n).weight.detach())
           for n, m in parts(own).items()}  # fmt: skip
    with torch.no_grad():
        x = batch()
        far["y"] = relative_error(own(x.to(dtype())), true(x.double()))
    return text, far


def sharded_flat(method, options, use_orig_params):
    """What FullyShardedDataParallel says of a part."""
    _, own = pair(method, options)
    place = {"device_id": device()}
    return refusal(FullyShardedDataParallel, own, use_orig_params=use_orig_params, **place)


def sharded_over_replicas(method, options):
    """What fully_shard over replicas says, with the parts and where they are left out."""
    mesh, said = grid(), []
    for ignore in (False, True):
        _, own = pair(method, options, mesh.get_group("part"))
        ignored = {m.weight for m in parts(own).values()} if ignore else None
        said.append(refusal(fully_shard, own, mesh=mesh["replica"], ignored_params=ignored))
    return said
