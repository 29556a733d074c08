"""How a linear layer is built for its case, and the figures that go with it.

floor of a step = its products at the layer's cost: `measure.floor`
"""

from blockshock import tuning
from blockshock.distributed import symmetric
from blockshock.linear import ways
from blockshock.measure.floor import step_floor
from blockshock.phases.linear.case import CHOSEN, LinearCase, usual
from blockshock.phases.linear.problem import Problem, check_data


def build(case: LinearCase, problem: Problem):
    """The layer, from the point's weight."""
    tuning.exact_sizes()  # a result tells what is fastest at its own number of rows
    return case.cls.from_dense(problem.weight, problem.bias, **case.options())


def figures(case: LinearCase, layer, problem: Problem, experiment, ceilings: dict | None) -> dict:
    """For the result: memory, floor, paths, and the ways of a layer that joins ranks."""
    estimated, actual = _of_weight(layer)
    floor = None
    if ceilings is not None:
        floor = step_floor(
            layer.cost(case.B),
            ceilings,
            phase=experiment.products,
            dtype=case.dtype,
            optimizer=case.optimizer,
            trained_bytes=experiment.trained_bytes,
            steps=experiment.steps,
        )
    return {
        "memory": {
            "symmetric_bytes": symmetric.held_bytes(),  # of the sums so far, outside the allocator
            "weight_bytes": actual,
            "weight_bytes_estimated": estimated,
        },
        "floor": floor,
        "paths": layer.paths(case.B) if hasattr(layer, "paths") else {},
        **_choices(layer, case.B),
    }


def _choices(layer, batch: int) -> dict:
    """`ways`, and a remark on what was measured for this case."""
    if not hasattr(layer, "output"):
        return {}
    found = ways.answers(layer, batch)
    fresh = [way for way in found.values() if way["took"]]
    if not fresh:
        return {"ways": found}
    took, names = sum(way["took"] for way in fresh), " and ".join(way["way"] for way in fresh)
    return {"ways": found, "remark": f"chose {names} in {took:.1f} s"}


def check_all(cases: list[LinearCase]) -> None:
    """`check_data` of every weight and input once."""
    for case in {(c.weight, c.input, c.N, c.K, c.B): c for c in cases}.values():
        check_data(case)


def usuals(case: LinearCase) -> dict:
    """For the result: what the method uses where nothing is asked."""
    return {
        "usual_mask": usual(case.cls, "mask"),
        "usual": {name: usual(case.cls, name) for name in CHOSEN},
    }


def rates(case: LinearCase, seconds: float, outcome: dict) -> dict:
    """Tokens are rows of the input. The dense-equivalent rate counts what the dense layer computes,
    all ranks together: 2·B·N·K for each product of the phase."""
    trained = case.phase == "training" and case.policy != "frozen"
    products = {"forward": 1, "backward": 2, "correctness": 3, "drift": case.steps or 8}
    count = products.get(case.phase, 3 if trained else 2)
    steps = case.steps or 8 if case.phase == "drift" else 1
    return {
        "tokens_per_s": steps * case.B / seconds,
        "dense_tflops": count * 2 * case.B * case.N * case.K / seconds / 1e12,
        "limit_fraction": outcome["floor"]["seconds"] / seconds,
    }


def _of_weight(layer) -> tuple[int, int]:
    """(estimated, actual) bytes of a layer's weight on this rank."""
    if hasattr(layer, "weight_bytes"):
        return layer.weight_bytes()
    estimated = layer.weight.nbytes
    return estimated, estimated + sum(buffer.nbytes for buffer in layer.buffers())
