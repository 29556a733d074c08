"""What ranks run for tests/test_data_parallel_laboratory.py."""

from blockshock.distributed.ranks import device
from blockshock.phases.data_parallel import steps
from blockshock.phases.data_parallel.case import DataParallelCase
from blockshock.phases.data_parallel.problem import Problem

TINY = {"width": 32, "depth": 1, "batch": 2, "T": 16, "vocabulary": 256, "dtype": "fp32"}


def case(phase="training", method="flat", **changed):
    return DataParallelCase(phase, method, **{**TINY, **changed})


def wrong(kind):
    """By figure, whether the check of a method with a fault passes."""
    one = case("correctness", "naive")
    problem = Problem(one, device())
    run = steps.Run(one, problem)
    finish = run.wrapper.finish_gradient_sync

    def faulty():
        finish()
        for parameter in run.wrapper.module.parameters():
            if kind == "sum, no mean":
                parameter.grad.mul_(one.ranks)
            if kind == "a tensor is lost" and parameter.dim() == 1:
                parameter.grad.zero_()

    run.wrapper.finish_gradient_sync = faulty
    figures = steps.correctness(one, run, problem).check()
    return {name: figure.passes for name, figure in figures.items()}
