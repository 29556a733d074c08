"""How a method of attention is built for its case, and the figures that go with it.

    floor = max( operations the mask needs / matrix rate,  bytes / copy bandwidth )

The bytes are q, k, v and out, and with a backward dO, dQ, dK, dV as well: each once.
"""

from blockshock.attention import blocks, patterns, shapes, work
from blockshock.phases.attention import steps
from blockshock.phases.attention.case import AttentionCase
from blockshock.phases.attention.problem import AttentionProblem

COUNTED = {"forward": "forward", "forward_backward": "both"}  # by `attention.work`


def build(case: AttentionCase, problem: AttentionProblem):
    """The method, after its first step: tables are made and kernels compiled.

    What it refuses, or has no memory for, it tells here.
    """
    steps.PHASES[case.phase](case, case.function, problem).step()
    return case.function


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
