"""What each phase does with a method of attention: the step that is timed, and its check.

    forward            O, nothing recorded for a backward
    forward_backward   O, then dQ, dK, dV for a given dO; a graph of autograd's own each step

A method passes when the relative error of each is at most 1.5 times that of the yardstick, which is
plain attention in the same dtype (`attention_problem`). In fp32, whose yardstick is hardly wrong,
1e-5 always passes; products in TF32 do not.
"""

import torch

from blockshock.measure.errors import Figure, figure
from blockshock.measure.regions import region
from blockshock.phases.attention.case import AttentionCase
from blockshock.phases.attention.problem import AttentionProblem
from blockshock.phases.experiment import Experiment

BOUND = 1.5  # times the yardstick's error
FLOAT32_ERROR = 1e-5


def forward(case: AttentionCase, method, problem: AttentionProblem) -> Experiment:
    """A forward, O, nothing recorded for a backward."""

    def step():
        with torch.no_grad(), region("forward"):
            return _call(method, problem, problem.q, problem.k, problem.v)

    def check():
        problem.poison()
        out = step()
        return {"output": _figure(out, problem.output, case)}

    return Experiment(step, check, "forward")


def forward_backward(case: AttentionCase, method, problem: AttentionProblem) -> Experiment:
    """A forward and the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]

    def step():
        with region("forward"):
            out = _call(method, problem, *inputs)
        with region("backward"):
            return out.detach(), *torch.autograd.grad(out, inputs, problem.d_out)

    def check():
        problem.poison()
        results, truths = step(), (problem.output, *problem.gradients)
        names = "output", "grad_q", "grad_k", "grad_v"
        return {
            name: _figure(result, truth, case)
            for name, result, truth in zip(names, results, truths, strict=True)
        }

    return Experiment(step, check, "forward_backward")


def _call(method, problem: AttentionProblem, q, k, v) -> torch.Tensor:
    return method(q, k, v, causal=problem.causal, pattern=problem.pattern)


def _figure(actual: torch.Tensor, true: tuple, case: AttentionCase) -> Figure:
    enough = FLOAT32_ERROR if case.dtype == "fp32" else 0.0
    return figure(actual, *true, bound=BOUND, enough=enough)


PHASES = {"forward": forward, "forward_backward": forward_backward}
