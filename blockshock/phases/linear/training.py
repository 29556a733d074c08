"""Training: forward (upkeep of the compressed form in it), loss, backward, optimizer, as one step.

The loss is `workloads.LOSSES[case.loss]`, summed over features and averaged over rows, so that the
gradient is 2 (Y − T) / B whatever N is, and fp16 does not underflow. The policies are the method's
own (`policies` in its class); under "frozen" only the bias is trained and dX computed.

The check compares the bias's gradient with the truth, then trains ten steps and compares the change
of this rank's weights, W₁₀ − W₀, with the same ten steps of a dense float64 layer; the yardstick is
a plain dense layer in the case's dtype. The change, not the weight: a missing gradient would hide
behind the weight it should have changed. (Ten steps of a bias say less than its gradient: in bf16
their rounding hides them.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockshock import sources, workloads
from blockshock.measure.errors import figure, relative_error
from blockshock.measure.regions import region
from blockshock.phases.experiment import Experiment
from blockshock.phases.linear.case import LinearCase
from blockshock.phases.linear.problem import Problem
from blockshock.phases.linear.steps import backward, weight_figure

STEPS = 10


def training(case: LinearCase, layer, problem: Problem) -> Experiment:
    """A step: forward, loss, backward, optimizer; the upkeep of the compressed form is in it."""
    trained = case.policy != "frozen"
    layer.weight.requires_grad_(trained)
    x = problem.x.clone().requires_grad_()
    optimizer = make_optimizer(case, layer.parameters(), problem.steepness)

    def step():
        optimizer.zero_grad(set_to_none=True)
        x.grad = None
        with region("forward"):
            y = layer(x)
        with region("loss"):
            loss = loss_of(case, y, problem.target)
        with region("backward"):
            loss.backward()
        with region("optimizer"):
            optimizer.step()

    def check():
        figures = {}
        if not trained:
            frozen = backward(case, layer, problem)
            figures = frozen.check()
            experiment.replicated.update(frozen.replicated)
            layer.bias.requires_grad_()
        if layer.bias is not None:
            layer.bias.grad = None
            layer(problem.x).backward(problem.dy)
            truth = problem.grad_bias
            figures["grad_bias"] = figure(layer.bias.grad, *truth, ranks=case.ranks)
            experiment.replicated["grad_bias"] = layer.bias.grad
        if trained:
            before = layer.weight.detach().clone()
            for _ in range(STEPS):
                step()
            change = layer.weight.detach().to(problem.truth_dtype) - before
            truth, dense = _ten_true_steps(case, problem)
            figures["weight_update"] = weight_figure(change, layer, truth, dense, case)
        return figures

    products = "training" if trained else "backward"
    size = sum(p.nbytes for p in layer.parameters() if p.requires_grad)
    experiment = Experiment(step, check, products, trained_bytes=size)
    return experiment


def make_optimizer(case: LinearCase, parameters, steepness: float) -> torch.optim.Optimizer:
    """The case's optimizer; on CUDA fused, with its state on the device, so a step can be captured.

    The rates move weights of size 1/√K by about a third of themselves in ten steps on gaussian
    input. steepness: how much steeper the loss is on this input (`Problem.steepness`); gradient
    descent diverges unless its rate falls with it.
    """
    parameters = [p for p in parameters if p.requires_grad]
    # Not on the CPU: there torch 2.13's fused SGD leaves bf16 parameters as they are.
    fused = parameters[0].device.type == "cuda"
    rate = 0.01 * (case.B / case.K) ** 0.5 / max(1.0, steepness)
    if case.optimizer == "adam":
        return torch.optim.Adam(parameters, 0.03 * case.K**-0.5, fused=fused, capturable=fused)
    momentum = 0.9 if case.optimizer == "momentum" else 0.0
    rate *= 0.3 if momentum else 1.0
    return torch.optim.SGD(parameters, rate, momentum=momentum, fused=fused)


def loss_of(case: LinearCase, y: Tensor, target: Tensor) -> Tensor:
    """The case's loss, summed over features and averaged over rows."""
    loss = workloads.LOSSES[case.loss](y, target.to(y.dtype))
    return loss / y.shape[0] if case.loss == "sum" else loss * y.shape[1]


def _ten_true_steps(case: LinearCase, problem: Problem):
    """(W₁₀ − W₀ of the true layer as a weight source, the yardstick's relative error)."""
    key = (case.optimizer, case.loss)
    cache = problem.__dict__.setdefault("trained", {})
    if key not in cache:
        truth = _train(case, problem, problem.truth_dtype)
        plain = _train(case, problem, problem.dtype)
        cache[key] = sources.as_source(truth), relative_error(plain, truth)
    return cache[key]


def _train(case: LinearCase, problem: Problem, dtype: torch.dtype) -> Tensor:
    """W₁₀ − W₀ of a plain dense layer, in the truth's dtype."""
    weight = nn.Parameter(problem.dense_weight(dtype))
    bias = None if problem.bias is None else nn.Parameter(problem.bias.to(dtype, copy=True))
    before = weight.detach().to(problem.truth_dtype, copy=True)
    parameters = [p for p in (weight, bias) if p is not None]
    optimizer = make_optimizer(case, parameters, problem.steepness)
    x = problem.x.to(dtype)
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        loss_of(case, F.linear(x, weight, bias), problem.target).backward()
        optimizer.step()
    return weight.detach().to(problem.truth_dtype) - before
