"""The phases of vector sums."""

from blockshock.measure.errors import figure
from blockshock.measure.regions import region
from blockshock.phases.case import Case
from blockshock.phases.experiment import Experiment
from blockshock.phases.vector_sum.problem import Problem


def forward(case: Case, method, problem: Problem) -> Experiment:
    """One sum."""

    def step():
        with region("forward"):
            return method(problem.x, problem.y)

    def check():
        return {"output": figure(step(), *problem.output, enough=1e-6)}

    return Experiment(step, check, "forward")


def twice(case: Case, method, problem: Problem) -> Experiment:
    """The sum of a sum."""

    def step():
        with region("forward"):
            return method(method(problem.x, problem.y), problem.y)

    def check():
        truth = problem.output[0] + problem.y.double()
        plain = problem.x + problem.y + problem.y
        dense = ((plain.double() - truth).norm() / truth.norm()).item()
        return {"output": figure(step(), truth, dense, enough=1e-6)}

    return Experiment(step, check, "forward")
