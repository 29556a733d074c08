"""A hybrid block: forward, or forward and backward, with sparse or with dense attention.

    hybrid_forward    y, nothing recorded for a backward
    hybrid_backward   y, then the gradients of x and of every weight

Checked before it is timed, against one process that computes the whole block with the same mask:
what attention adds to x (in y it is small beside the rest), y, and in `hybrid_backward` every
gradient, gathered, and those of all weights as one vector, which shows their length.

    floor = the larger of arithmetic, counting pairs that attend alone; of the bytes of weights,
            x, y and their gradients, each moved once; and of the sums over ranks
"""

import torch
from torch import Tensor

from blockshock.attention import work
from blockshock.distributed import noting
from blockshock.measure.errors import (
    Figure,
    both_errors,
    figure,
    relative_error,
    vector_figure,
    yardstick,
)
from blockshock.measure.floor import all_reduce_wire
from blockshock.measure.regions import region
from blockshock.phases.experiment import Experiment
from blockshock.phases.transformer import by_rows
from blockshock.phases.transformer.case import TransformerCase
from blockshock.phases.transformer.decoders import flat
from blockshock.sources import generator
from blockshock.transformer import HybridBlock, compile_model
from blockshock.transformer.config import usual_attention
from blockshock.transformer.hybrid import dense_attention, dense_reference, initial_weights

SAME = 1e-5  # a relative error that passes in fp32: sums in another order
LARGE = ("attention", "output", "grad_x")  # results of [batch, T, width]; others are of weights
SUMS = {"hybrid_forward": 2, "hybrid_backward": 4}  # over ranks, each of [batch, T, width]


class Problem:
    """x and the gradient of y, [batch, T, width] in the case's dtype, alike on all ranks.

    The truth is in `truth_dtype`, of one mask at a time: it is large.
    """

    def __init__(self, case: TransformerCase, device: torch.device):
        self.case, self.device = case, device
        self.truth_dtype = torch.float64 if case.dtype == "fp32" else torch.float32
        if case.compiled:
            torch.compiler.reset()  # PyTorch keeps 8 compilations of a function, and then refuses
        size = case.batch, case.T, case.width

        def drawn(name):
            source = generator(device, f"hybrid/{name}", case.problem_seed)
            return torch.randn(size, generator=source, device=device).to(case.torch_dtype)

        self.x, self.dy = drawn("x"), drawn("dy")
        self._truths: dict[str | None, dict] = {}  # by pattern, the last one alone

    def warm_up(self) -> None:
        """Nothing: the check runs a step first."""

    def weights(self) -> torch.Generator:
        """Of the weights: on the GPU, if there is one, where they are drawn in no time."""
        return generator(self.device, "hybrid/weights", self.case.problem_seed)

    @noting("computing the truth")
    def truth(self, case: TransformerCase) -> dict[str, tuple]:
        """By result: the true one, and the yardstick as its figure takes it."""
        if case.pattern not in self._truths:
            self._truths.clear()
            true = self._dense(case, self.truth_dtype)
            plain = self._dense(case, case.torch_dtype)
            found = {
                name: (true[name], *both_errors(plain[name], true[name]))
                for name in LARGE
                if name in true
            }
            entries = {name: t.numel() for name, t in true.items() if name not in LARGE}
            found |= {
                name: (true[name], relative_error(plain[name], true[name])) for name in entries
            }
            if entries:
                whole = flat(true, entries)
                found["gradient"] = whole, yardstick(flat(plain, entries), whole, entries)
            self._truths[case.pattern] = found
        return self._truths[case.pattern]

    def _dense(self, case: TransformerCase, dtype: torch.dtype) -> dict[str, Tensor]:
        """The results of one process, sequence by sequence; gradients of weights add up wide."""
        config, backward = case.config, case.phase == "hybrid_backward"
        sizes = config.width, config.heads, config.kv_heads, config.hidden
        # Rounded to the case's dtype first: those are the block's.
        weights = {
            name: w.to(case.torch_dtype).to(dtype).requires_grad_(backward)
            for name, w in initial_weights(*sizes, self.weights()).items()
        }
        mask = {"pattern": case.mask, "causal": case.causal, "attend": by_rows.attend}
        rows, totals = [], {}
        for x, dy in zip(self.x.to(dtype).split(1), self.dy.to(dtype).split(1), strict=True):
            with torch.no_grad():
                found = {"attention": dense_attention(x, weights, config.heads, **mask)}
            x.requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                y = dense_reference(x, weights, config.heads, **mask)
            if backward:
                found["grad_x"], *own = torch.autograd.grad(y, [x, *weights.values()], dy)
                for name, gradient in zip(weights, own, strict=True):
                    wide = gradient.to(torch.promote_types(dtype, torch.float32))
                    totals[name] = totals[name] + wide if name in totals else wide
            rows.append({**found, "output": y.detach()})
        joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return joined | _gradients({name: total.to(dtype) for name, total in totals.items()})


class Run:
    """The block, after its first step: lists of tiles are made and kernels compiled."""

    def __init__(self, case: TransformerCase, problem: Problem):
        self.case, self.problem = case, problem
        self.model = HybridBlock(
            case.width,
            case.heads,
            pattern=case.mask,
            causal=case.causal,
            reduce=case.reduce,
            generator=problem.weights(),
            device=problem.device,
            dtype=case.torch_dtype,
        )
        if case.compiled:
            compile_model(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.x = problem.x.detach().requires_grad_(case.phase == "hybrid_backward")
        self.step()

    def step(self) -> tuple[Tensor, ...]:
        """y; in `hybrid_backward` then the gradient of x and of each parameter."""
        backward = self.case.phase == "hybrid_backward"
        with region("forward"), torch.set_grad_enabled(backward):
            y = self.model(self.x)
        if not backward:
            return (y,)
        with region("backward"):
            inputs = self.x, *self.parameters.values()
            return y.detach(), *torch.autograd.grad(y, inputs, self.problem.dy)


def hybrid_forward(case: TransformerCase, run: Run, problem: Problem) -> Experiment:
    """A block, forward."""
    return _experiment(case, run, problem)


def hybrid_backward(case: TransformerCase, run: Run, problem: Problem) -> Experiment:
    """A block, forward and backward."""
    return _experiment(case, run, problem)


def _experiment(case: TransformerCase, run: Run, problem: Problem) -> Experiment:
    def check() -> dict[str, Figure]:
        y, *found = run.step()
        results = {"output": y}
        if found:
            dx, *of_parameters = found
            whole = run.model.gather(dict(zip(run.parameters, of_parameters, strict=True)))
            results |= {"grad_x": dx} | _gradients(whole)
        of_all = ("output", "grad_x", "grad_attention_norm", "grad_mlp_norm")
        experiment.replicated |= {n: t for n, t in results.items() if n in of_all}
        with torch.no_grad():
            results["attention"] = run.model.attention(run.x)
        true, enough = problem.truth(case), SAME if case.dtype == "fp32" else 0.0
        if found:
            results["gradient"] = flat(results, true["gradient"][1].tensors)
        return {
            name: (vector_figure if name == "gradient" else figure)(
                results[name], *of_name, ranks=case.ranks, enough=enough
            )
            for name, of_name in true.items()
        }

    experiment = Experiment(run.step, check, "forward")
    return experiment


def _gradients(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"grad_{name.removesuffix('.weight')}": gradient for name, gradient in whole.items()}


def figures(case: TransformerCase, run: Run, problem: Problem, experiment, ceilings) -> dict:
    """For the result: memory, work of a rank, floor, paths."""
    pairs = work.pairs(
        case.mask, case.causal, case.T, case.T, case.batch, case.heads, device=problem.device
    )
    found = _work(case, pairs)
    backward, floor = case.phase == "hybrid_backward", None
    weights = sum(p.nbytes for p in run.parameters.values())
    if ceilings is not None:
        stream = problem.x.nbytes
        moved = (3 if backward else 1) * weights + (4 if backward else 2) * stream
        wire = SUMS[case.phase] * all_reduce_wire(stream, case.ranks)
        rate = ceilings["matrix_flops"][case.dtype]
        terms = {
            "compute": (found["attention_flops"] + found["projection_flops"]) / rate,
            "memory": moved / ceilings["copy_bytes_per_s"],
            "wire": wire / ceilings["link_bytes_per_s"] if wire else 0.0,
        }
        floor = {"seconds": max(terms.values()), **terms}
    return {
        "memory": {"weight_bytes": weights},
        "work": found,
        "floor": floor,
        "paths": {
            "attention": usual_attention(problem.device.type, case.mask),
            "reduce": str(run.model.sums.plan(problem.x)),
        },
    }


def rates(case: TransformerCase, seconds: float, outcome: dict) -> dict:
    """Tokens of all sequences a second; operations of a rank; the share of pairs left out."""
    done = outcome["work"]
    return {
        "tokens_per_s": case.batch * case.T / seconds,
        "tflops": (done["attention_flops"] + done["projection_flops"]) / seconds / 1e12,
        "sparsity": done["sparsity"],
        "limit_fraction": outcome["floor"]["seconds"] / seconds,
    }


def _work(case: TransformerCase, pairs: int) -> dict:
    """Operations of a rank. Those of a projection are 2 forward and 4 backward for each weight."""
    config, backward = case.config, case.phase == "hybrid_backward"
    counted = work.flops("both" if backward else "forward", pairs, config.head_width)
    weights = case.width * (2 * case.width + 2 * config.kv_heads * config.head_width)
    weights += 3 * case.width * config.hidden
    tokens = case.batch * case.T
    return {
        "pairs": pairs,
        "sparsity": 1 - pairs / (tokens * case.T * case.heads),
        "attention_flops": counted / case.ranks,
        "projection_flops": (6 if backward else 2) * tokens * weights / case.ranks,
    }
