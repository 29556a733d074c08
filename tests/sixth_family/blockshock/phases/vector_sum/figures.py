"""Memory, floor and rates of vector sums."""

from blockshock.phases.vector_sum.case import VectorSumCase
from blockshock.phases.vector_sum.problem import Problem


def build(case: VectorSumCase, problem: Problem):
    """The method itself."""
    return case.methods[case.method]


def figures(case: VectorSumCase, method, problem: Problem, experiment, ceilings) -> dict:
    """For the result."""
    moved = 3 * problem.x.nbytes
    floor = None
    if ceilings is not None:
        seconds = moved / ceilings["copy_bytes_per_s"]
        floor = {"seconds": seconds, "compute": 0.0, "memory": seconds, "wire": 0.0}
    return {"memory": {"input_bytes": problem.held_bytes()}, "floor": floor, "paths": {}}


def rates(case: VectorSumCase, seconds: float, outcome: dict) -> dict:
    """Entries a second."""
    return {
        "entries_per_s": case.n / seconds,
        "limit_fraction": outcome["floor"]["seconds"] / seconds,
    }
