"""What each phase does with a layer: the step that is timed, and the check that must pass first.

    correctness   Y, dX, dW and db together
    forward       Y, nothing recorded for a backward
    backward      Y and dX; the weight is frozen
    drift         T times Y, normalised in between, against the same chain in float64

(`training` has a file of its own.) A phase is a function of (case, layer, problem) that returns an
`Experiment`; the package lists them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blockshock.measure.errors import Figure, figure, relative_error
from blockshock.measure.regions import region
from blockshock.phases.experiment import Experiment
from blockshock.phases.linear.case import LinearCase
from blockshock.phases.linear.problem import Problem


def forward(case: LinearCase, layer, problem: Problem) -> Experiment:
    """A forward, Y = X Wᵀ + b, nothing recorded for a backward."""

    def step():
        with torch.no_grad(), region("forward"):
            return layer(problem.x)

    def check():
        return {"output": _against(experiment, "output", step(), problem.output, case)}

    experiment = Experiment(step, check, "forward")
    return experiment


def backward(case: LinearCase, layer, problem: Problem) -> Experiment:
    """A forward and a backward to the input; the weights are frozen."""
    layer.requires_grad_(False)
    x = problem.x.clone().requires_grad_()
    step = _forward_backward(layer, x, problem.dy)

    def check():
        y = step()
        return {
            "output": _against(experiment, "output", y, problem.output, case),
            "grad_input": _against(experiment, "grad_input", x.grad, problem.grad_input, case),
        }

    experiment = Experiment(step, check, "backward")
    return experiment


def correctness(case: LinearCase, layer, problem: Problem) -> Experiment:
    """A forward and a whole backward: dX, dW and db."""
    x = problem.x.clone().requires_grad_()
    run = _forward_backward(layer, x, problem.dy)

    def step():
        layer.zero_grad(set_to_none=True)
        return run()

    def check():
        y = step()
        figures = {
            "output": _against(experiment, "output", y, problem.output, case),
            "grad_input": _against(experiment, "grad_input", x.grad, problem.grad_input, case),
            "grad_weight": weight_figure(
                layer.weight.grad, layer, problem.grad_weight, problem.grad_weight_error, case
            ),
        }
        if layer.bias is not None:
            bias = layer.bias.grad
            figures["grad_bias"] = _against(experiment, "grad_bias", bias, problem.grad_bias, case)
        return figures

    size = sum(parameter.nbytes for parameter in layer.parameters())
    experiment = Experiment(step, check, "correctness", trained_bytes=size)
    return experiment


def drift(case: LinearCase, layer, problem: Problem) -> Experiment:
    """A chain of `steps` forwards, each on the normalised output of the one before."""
    steps = case.steps or 8

    def chain(product, x):
        for _ in range(steps):
            x = normalised(product(x))
            yield x

    def step():
        with torch.no_grad(), region("forward"):
            for x in chain(layer, problem.x):
                last = x
        return last

    def check():
        weight = problem.dense_weight()
        chains = zip(
            chain(layer, problem.x),
            chain(lambda x: F.linear(x, weight, problem.bias), problem.x),
            chain(problem.true_forward, problem.x),
            strict=True,
        )
        method, dense = [], []
        with torch.no_grad():
            for own, plain, truth in chains:
                dense.append(relative_error(plain, truth))
                last = figure(own, truth, dense[-1], ranks=case.ranks)
                method.append(last.relative)
        experiment.extra["drift"] = {"method": method, "dense": dense}
        experiment.replicated["output"] = own
        return {"output": last}

    experiment = Experiment(step, check, "drift", steps=steps)
    return experiment


def normalised(x: Tensor) -> Tensor:
    """x with root mean square 1, in its own dtype; the norm is taken in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    size = torch.linalg.vector_norm(x, dtype=wide) / x.numel() ** 0.5
    return (x / size).to(x.dtype)


def weight_figure(actual: Tensor, layer, source, dense: float, case: LinearCase) -> Figure:
    """The error of a parameter-shaped tensor against this rank's part of a true [N, K]."""
    return figure(actual, layer.restrict(source)["weight"], dense, ranks=case.ranks)


def _forward_backward(layer, x: Tensor, dy: Tensor):
    def run():
        x.grad = None
        with region("forward"):
            y = layer(x)
        with region("backward"):
            y.backward(dy)
        return y.detach()

    return run


def _against(experiment, name, actual, true: tuple[Tensor, float], case: LinearCase) -> Figure:
    experiment.replicated[name] = actual
    return figure(actual, *true, ranks=case.ranks)
