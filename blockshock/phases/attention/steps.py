"""What each phase does with a method of attention, and the figures that go with it.

    forward            O, nothing recorded for a backward
    forward_backward   O, then dQ, dK, dV for a given dO; a graph of autograd's own each step

A method passes when the relative error of each is at most 1.5 times that of the yardstick, which is
plain attention in the same dtype (`attention_problem`). In fp32, whose yardstick is hardly wrong,
1e-5 always passes; products in TF32 do not.

    floor = max( operations the mask needs / matrix rate,  bytes / copy bandwidth )

The bytes are q, k, v and out, and with a backward dO, dQ, dK, dV as well: each once.
"""

import torch

from blockshock.attention import blocks, patterns, shapes, work
from blockshock.measure.errors import Figure, figure
from blockshock.measure.regions import region
from blockshock.phases.attention.case import AttentionCase
from blockshock.phases.attention.problem import AttentionProblem
from blockshock.phases.experiment import Experiment

BOUND = 1.5  # times the yardstick's error
FLOAT32_ERROR = 1e-5
COUNTED = {"forward": "forward", "forward_backward": "both"}  # by `attention.work`


def build(case: AttentionCase, problem: AttentionProblem):
    """The method, after its first step: tables are made and kernels compiled.

    What it refuses, or has no memory for, it tells here.
    """
    PHASES[case.phase](case, case.function, problem).step()
    return case.function


def forward(case: AttentionCase, method, problem: AttentionProblem) -> Experiment:
    """Throughput of O alone."""

    def step():
        with torch.no_grad(), region("forward"):
            return _call(method, problem, problem.q, problem.k, problem.v)

    def check():
        problem.poison()
        out = step()
        return {"output": _figure(out, problem.output, case)}

    return Experiment(step, check, "forward")


def forward_backward(case: AttentionCase, method, problem: AttentionProblem) -> Experiment:
    """O and the gradients of q, k and v."""
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


def figures(case: AttentionCase, method, problem: AttentionProblem, experiment, ceilings) -> dict:
    """For the result: memory, work, floor, pattern, paths."""
    backward = case.phase == "forward_backward"
    inputs = (problem.q, problem.k, problem.v, *([problem.d_out] if backward else []))
    moved = (1 + backward) * 2 * (problem.q.nbytes + problem.k.nbytes)
    flops = work.flops(COUNTED[case.phase], problem.pairs, case.D)
    floor = None
    if ceilings is not None:
        terms = {
            "compute": flops / ceilings["matrix_flops"][case.dtype],
            "memory": moved / ceilings["copy_bytes_per_s"],
            "wire": 0.0,
        }
        floor = {"seconds": max(terms.values()), **terms}
    return {
        "memory": {"input_bytes": sum(x.nbytes for x in inputs)},
        "work": {"pairs": problem.pairs, "flops": flops, "bytes": moved},
        "floor": floor,
        "pattern": _pattern(case, method, problem),
        "paths": {},
    }


def rates(case: AttentionCase, seconds: float, outcome: dict) -> dict:
    """Tokens are queries; operations are those the mask needs, whatever a method computes."""
    return {
        "tokens_per_s": case.batch * case.Tq / seconds,
        "tflops": outcome["work"]["flops"] / seconds / 1e12,
        "matrix_fraction": outcome["floor"]["compute"] / seconds,
        "limit_fraction": outcome["floor"]["seconds"] / seconds,
    }


def _call(method, problem: AttentionProblem, q, k, v) -> torch.Tensor:
    return method(q, k, v, causal=problem.causal, pattern=problem.pattern)


def _figure(actual: torch.Tensor, true: tuple[torch.Tensor, float], case: AttentionCase) -> Figure:
    enough = FLOAT32_ERROR if case.dtype == "fp32" else 0.0
    return figure(actual, *true, bound=BOUND, enough=enough)


def _pattern(case: AttentionCase, method, problem: AttentionProblem) -> dict | None:
    """What the mask leaves out, and what the method's table of tiles does, where it has one."""
    if problem.pattern is None:
        return None
    shape: shapes.Shape = problem.shape
    sparsity = 1 - problem.pairs / (shape.batch * shape.heads * shape.Tq * shape.Tk)
    told = {
        "name": case.pattern,
        "sparsity": sparsity,
        "ideal_speedup": patterns.ideal_speedup(sparsity),
    }
    if hasattr(method, "table"):
        table: blocks.BlockTable = method.table(
            shape, problem.dtype, problem.causal, problem.pattern, problem.device
        )
        told |= {
            "touched_sparsity": table.touched_sparsity,
            "touched_ideal_speedup": table.ideal_speedup,
            "table_seconds": table.build_seconds,
            "table_bytes": table.nbytes,
            "block_q": table.block_q,
            "block_k": table.block_k,
        }
    return told


PHASES = {"forward": forward, "forward_backward": forward_backward}
