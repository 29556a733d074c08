"""What ranks run for tests/test_hybrid_laboratory.py."""

import torch
import torch.distributed as dist

from blockshock.attention import patterns
from blockshock.distributed.ranks import device
from blockshock.phases.transformer import hybrid
from blockshock.phases.transformer.case import TransformerCase

TINY = {"width": 64, "heads": 4, "batch": 2, "T": 37}


def case(phase="hybrid_backward", method="sparse_attention", **changed):
    sparse = {"pattern": "band(8)"} if method == "sparse_attention" else {}
    return TransformerCase(phase, method, **{**TINY, "dtype": "fp32", **sparse, **changed})


def wrong(phase, kind):
    """By result, whether the check passes of a block with a fault."""
    one = case(phase)
    problem = hybrid.Problem(one, device())
    run = hybrid.Run(one, problem)
    last = dist.get_rank() == dist.get_world_size() - 1
    if kind == "window":
        run.model.pattern = patterns.band(9)
    if kind == "causal":
        run.model.causal = False
    if kind == "a rank's weight" and last:
        with torch.no_grad():
            run.model.down.weight.as_subclass(torch.Tensor)[0] += 1
    if kind == "gradient":
        run.model.sums.enter = lambda x: x
    experiment = getattr(hybrid, phase)(one, run, problem)
    return {name: figure.passes for name, figure in experiment.check().items()}
