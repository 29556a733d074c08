"""What each phase does with a wrapped decoder: the step that is timed, and the check before it.

    correctness   forward, backward, exchange
    gradients     the same, timed: over the time of `none`, what the exchange costs
    training      the same, clipping and AdamW
    lm            the same as training; before it, k steps from the first weights, whose losses stay

Every check compares two things with the truth: the gradient, read off a step of plain SGD, which
tells it for sharded gradients as well; and, where a phase trains, what a few whole steps change.
Both are judged as a whole, in their length, and tensor by tensor (`measure.errors`).
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor

from blockshock.measure.errors import Figure, vector_figure
from blockshock.measure.regions import region
from blockshock.phases.data_parallel.case import DataParallelCase
from blockshock.phases.data_parallel.problem import MAX_NORM, OPTIMIZER, STEPS, Problem
from blockshock.phases.experiment import Experiment
from blockshock.transformer import compile_model

# Relative errors that pass in fp32: of sums in another order; and of AdamW, whose first steps are
# as long as lr however small the gradient, so rounding decides their sign where it is almost 0.
SAME_GRADIENT, SAME_UPDATE = 1e-5, 1e-2
# Entries of each tensor that AdamW may so turn round. In bf16, of 64 entries one was at times.
ASTRAY = 4


class Run:
    """A wrapped decoder, and the optimizer once a phase has made it."""

    def __init__(self, case: DataParallelCase, problem: Problem):
        model = copy.deepcopy(problem.model)
        if case.compiled:
            compile_model(model)
        self.case, self.problem = case, problem
        self.wrapper = case.cls(model, **case.options())
        self.optimizer, self.at = None, 0

    def backward(self) -> Tensor:
        """Loss and gradients of the next batch, exchanged; returns this rank's loss."""
        tokens, targets = self.problem.own(self.at)
        self.at += 1
        with region("forward"), self.problem.autocast(self.case.torch_dtype):
            loss = self.wrapper(tokens, targets)
        with region("backward"):
            loss.backward()
        with region("sync"):  # what is left of the exchange after the backward
            self.wrapper.finish_gradient_sync()
        return loss.detach()

    def train(self) -> Tensor:
        """A whole step; returns this rank's loss before it."""
        loss = self.backward()
        with region("clip"):
            self.wrapper.clip_grad_norm_(MAX_NORM)
        with region("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    def restart(self) -> None:
        """The first weights, a new optimizer, the first batch."""
        self.wrapper.zero_grad()
        self.wrapper.load_full_state_dict(self.problem.model.state_dict())
        fused = self.problem.device.type == "cuda"
        self.optimizer = self.wrapper.optimizer(torch.optim.AdamW, fused=fused, **OPTIMIZER)
        self.at = 0

    def change(self) -> Tensor:
        """Of all parameters since the first weights, as one vector."""
        return self.problem.flat(self.wrapper.full_state_dict()) - self.problem.start


def correctness(case: DataParallelCase, run: Run, problem: Problem) -> Experiment:
    """A forward, a backward and the exchange of gradients."""
    return _gradients(case, run, problem, trained=True)


def gradients(case: DataParallelCase, run: Run, problem: Problem) -> Experiment:
    """A forward, a backward and the exchange of gradients."""
    return _gradients(case, run, problem, trained=False)


def training(case: DataParallelCase, run: Run, problem: Problem) -> Experiment:
    """A training step: forward, backward, exchange, clipping, AdamW."""
    return _training(case, run, problem)


def lm(case: DataParallelCase, run: Run, problem: Problem) -> Experiment:
    """A training step, after `steps` steps from the first weights."""
    experiment = _training(case, run, problem)
    check = experiment.check

    def check_and_train():
        figures = check()
        run.restart()
        losses = torch.stack([run.train() for _ in range(case.steps)])
        dist.all_reduce(losses)
        losses = (losses / case.ranks).tolist()
        experiment.extra["curves"] = {"loss": losses}
        return figures

    experiment.check = check_and_train
    return experiment


def _gradients(case, run: Run, problem: Problem, *, trained: bool) -> Experiment:
    def step():
        run.wrapper.zero_grad()
        run.backward()

    def check():
        figures = _both(experiment, run) if trained else {"gradient": _gradient(experiment, run)}
        run.optimizer = None
        return figures

    experiment = Experiment(step, check, "correctness")
    return experiment


def _training(case, run: Run, problem: Problem) -> Experiment:
    def check():
        return _both(experiment, run)

    size = sum(p.nbytes for p in problem.model.parameters())
    experiment = Experiment(run.train, check, "training", trained_bytes=size)
    return experiment


def _both(experiment: Experiment, run: Run) -> dict[str, Figure]:
    """Ranks that exchange nothing drift apart: their gradient alone is checked."""
    figures = {"gradient": _gradient(experiment, run)}
    if _whole(run):
        figures["update"] = _update(experiment, run)
    return figures


def _gradient(experiment: Experiment, run: Run) -> Figure:
    truth, dense = run.problem.gradient(whole=_whole(run), cast=_cast(run))
    # So long a step that the weights' own rounding hides nothing of it.
    rate = float(run.problem.start.norm() / truth.norm())
    optimizer = run.wrapper.optimizer(torch.optim.SGD, lr=rate)
    run.at = 0
    run.backward()
    optimizer.step()
    found = run.change() / -rate
    run.restart()
    return _figure(experiment, "gradient", run, found, truth, dense, SAME_GRADIENT)


def _update(experiment: Experiment, run: Run) -> Figure:
    run.restart()
    for _ in range(STEPS):
        run.train()
    truth, dense = run.problem.update(cast=_cast(run))
    found = run.change()
    run.restart()
    return _figure(experiment, "update", run, found, truth, dense, SAME_UPDATE, ASTRAY)


def _figure(experiment, name, run: Run, found, truth, dense, enough, astray=0) -> Figure:
    if _whole(run):
        experiment.replicated[name] = found
    enough = enough if run.case.dtype == "fp32" else 0.0
    options = {"ranks": run.case.ranks, "enough": enough, "astray": astray}
    return vector_figure(found, truth, dense, **options)


def _whole(run: Run) -> bool:
    """Whether the ranks exchange gradients."""
    return not run.wrapper.alone


def _cast(run: Run) -> bool:
    """Whether the parameters are bf16 while they are used."""
    return run.case.compute_dtype is not None
