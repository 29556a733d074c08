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


def wrong(phase, kind, dtype="fp32"):
    """By result, whether the check passes of a block with a fault."""
    one = case(phase, dtype=dtype)
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
    if kind in ("1% too long", "half a norm's gradient"):
        step, factor = run.step, 1.01 if kind == "1% too long" else 0.5
        names = [name for name in run.parameters if factor > 1 or "mlp_norm" in name]

        def faulty():
            y, dx, *found = step()
            found = zip(run.parameters, found, strict=True)
            return y, dx, *(g * factor if name in names else g for name, g in found)

        run.step = faulty
    experiment = getattr(hybrid, phase)(one, run, problem)
    return {name: figure.passes for name, figure in experiment.check().items()}
