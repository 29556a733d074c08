"""What ranks run for tests/test_transformer_laboratory.py."""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from blockshock.distributed.ranks import device
from blockshock.measure.errors import relative_error
from blockshock.phases.engine import Options, measure_point
from blockshock.phases.transformer import PHASES, TransformerCase, simulation

TINY = {"width": 32, "depth": 4, "heads": 4, "batch": 2, "T": 16, "vocabulary": 256}


def case(phase="sync", method="tp", **changed):
    return TransformerCase(phase, method, **{**TINY, "dtype": "fp32", **changed})


def wrong(phase, kind, dtype="fp32"):
    """By figure, what the check finds in a model with a fault; and what all ranks must share."""
    one = case(phase, "spd_2", dtype=dtype)
    if "bias" in kind:  # which no sweep asks for
        one.__dict__["config"] = replace(one.config, bias=True)
    module, function = PHASES[phase]
    problem = module.Problem(one, device())
    run = module.Run(one, problem)
    last = dist.get_rank() == dist.get_world_size() - 1
    if kind == "another plan":
        run.model = problem.parallel(case(phase, "spd"))
        run.restart() if phase == "sync" else None
    if kind == "a rank's weight" and last:
        with torch.no_grad():
            weights = [p for p in run.model.blocks[-1].parameters() if p.dim() > 1]
            weights[0][0] += 1
    if kind == "a rank's cache" and last:
        run.caches.blocks[1][1][:, :, 3] = 0
    if phase == "sync":
        run.backward = lambda backward=run.backward: gone_wrong(kind, run, backward)
    if kind == "a replica drifts":
        step = run.step

        def drifting():
            step()
            with torch.no_grad():
                run.model.head.norm.weight += 1e-6 * last

        run.step = drifting
    experiment = function(one, run, problem)
    figures = experiment.check()
    return {name: figure.faults() for name, figure in figures.items()}, experiment.replicated


def gone_wrong(kind, run, backward):
    """A backward whose gradients are wrong in one way."""
    last = dist.get_rank() == dist.get_world_size() - 1
    tokens, block = run.problem.tokens, run.model.blocks[-1]
    if kind == "the last sequence is lost":
        run.problem.tokens = tokens[:-1]
    backward()
    run.problem.tokens = tokens
    if kind == "a rank forgets a gradient" and last:
        block.out.weight.grad.zero_()
    if kind == "half a norm's gradient":  # as if a rank's had not been added
        block.mlp_norm.weight.grad.mul_(0.5)
    if kind == "half a bias's gradient":
        block.down.bias.grad.mul_(0.5)
    factor = {
        "1% too long": 1.01,
        "a bucket is doubled": 2,
        "the last sequence is lost": 1 - 1 / len(tokens),
    }.get(kind, 1)
    for p in block.parameters() if kind == "a bucket is doubled" else run.model.parameters():
        p.grad.mul_(factor)


def truth_of_one_process(ranks, **sizes):
    """By result, the relative difference of the truth from the simulation of the whole batch."""
    one = case("sync", "spd_2", ranks=ranks, **sizes)
    problem = PHASES["sync"][0].Problem(one, device())
    found = problem.truth(one)
    model, tokens = problem.in_dtype(torch.float64), problem.tokens
    logits = simulation.logits(model, problem.plan(one), ranks, tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    whole = {"output": logits[:1].detach(), "gradient": gradient}
    return {name: relative_error(whole[name], true) for name, (true, *_) in found.items()}


def outcomes(cases):
    """What each case comes to, checked and not timed."""
    return measure_point(cases, Options(rounds=0))
