"""The training step of a decoder under a sync plan: forward, backward, AdamW.

Checked before it is timed: the logits of a sequence, and the gradient of every weight, against a
simulation of the plan's ranks (`simulation`), which the ranks compute together, each for some of
the sequences (`dealt`); and after two steps, that all ranks have the same bits of the norm scales,
whose gradients are summed from streams that differ.

    floor = the larger of arithmetic, of the optimizer's traffic, and of the sums over ranks
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blockshock.distributed import noting
from blockshock.measure.errors import Figure, both_errors, figure, vector_figure, yardstick
from blockshock.measure.floor import OPTIMIZER_PASSES, all_reduce_wire
from blockshock.measure.regions import region
from blockshock.phases import dealt
from blockshock.phases.experiment import Experiment
from blockshock.phases.transformer import simulation
from blockshock.phases.transformer.case import TransformerCase
from blockshock.phases.transformer.decoders import Dense, flat, paths
from blockshock.transformer import Decoder, counts
from blockshock.transformer.language_model import part_compiler

OPTIMIZER = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
STEPS = 2  # after which replicas are compared
SAME = 1e-5  # a relative error that passes in fp32: sums in another order


class Problem(Dense):
    """First weights in float32, tokens [batch, T + 1], the truth of the plan that is checked."""

    def __init__(self, case: TransformerCase, device: torch.device):
        super().__init__(case, device, torch.float32, case.T + 1)
        # One for all plans: most have the same sublayers, and each graph takes seconds.
        self.compiler = part_compiler()
        self._truth = (None, None)  # of one plan: a large model's gradients are large

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        """What a decoder runs in for products in `dtype`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    @property
    def entries(self) -> dict[str, int]:
        """Of each parameter how many, a tied one once."""
        return {name: p.numel() for name, p in self.model.named_parameters()}

    @noting("computing the truth")
    def truth(self, case: TransformerCase) -> dict[str, tuple]:
        """By result: the true one, and the yardstick as its figure takes it."""
        if self._truth[0] != case.plan:
            self._truth = (None, None)
            true = self._simulated(case, self.truth_dtype)
            plain = self._simulated(case, case.torch_dtype)
            output = both_errors(plain["output"], true["output"])
            gradient = yardstick(plain["gradient"], true["gradient"], self.entries)
            found = {"output": (true["output"], *output), "gradient": (true["gradient"], gradient)}
            self._truth = (case.plan, found)
        return self._truth[1]

    def _simulated(self, case: TransformerCase, dtype: torch.dtype) -> dict[str, Tensor]:
        """Logits of the first sequence, and the gradient of the mean loss as one vector."""
        model = self.in_dtype(torch.promote_types(dtype, torch.float32))

        def logits(row):
            with self.autocast(dtype):
                return simulation.logits(model, self.plan(case), self.ranks, row[:, :-1])

        with torch.no_grad():
            output = logits(self.tokens[:1])
        for row in dealt.own_rows(self.tokens):
            out = logits(row)
            wide = out.to(torch.promote_types(out.dtype, torch.float32))
            loss = F.cross_entropy(wide.flatten(0, 1), row[:, 1:].flatten())
            (loss / len(self.tokens)).backward()
        dealt.add_gradients(model.parameters())
        return {"output": output, "gradient": flat(_gradients(model), self.entries)}


class Run:
    """The parallel decoder and its optimizer."""

    def __init__(self, case: TransformerCase, problem: Problem):
        self.case, self.problem = case, problem
        self.model = problem.parallel(case)
        if case.compiled:
            self.model.compile_parts(problem.compiler)
        self.restart()

    def restart(self) -> None:
        """The first weights, and a new optimizer."""
        self.model.zero_grad()
        self.model.load_full_state_dict(self.problem.model.state_dict())
        fused = self.problem.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=fused, **OPTIMIZER)

    def backward(self) -> None:
        """The gradients of the whole batch."""
        tokens = self.problem.tokens
        with region("forward"), self.problem.autocast(self.case.torch_dtype):
            loss = self.model(tokens[:, :-1], tokens[:, 1:])
        with region("backward"):
            loss.backward()

    def step(self) -> None:
        """A training step."""
        self.backward()
        with region("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def logits(self) -> Tensor:
        """Of the first sequence: [1, T, vocabulary]."""
        # In the batch that is timed: for another size the model would be compiled for any.
        with self.problem.autocast(self.case.torch_dtype):
            return self.model(self.problem.tokens[:, :-1])[:1].detach().clone()


def sync(case: TransformerCase, run: Run, problem: Problem) -> Experiment:
    """A training step: forward, backward, AdamW."""

    def check() -> dict[str, Figure]:
        found = {"output": run.logits()}
        run.backward()
        found["gradient"] = flat(run.model.gather_gradients(), problem.entries)
        true, enough = problem.truth(case), SAME if case.dtype == "fp32" else 0.0
        figures = {
            name: judge(found[name], *true[name], ranks=case.ranks, enough=enough)
            for name, judge in (("output", figure), ("gradient", vector_figure))
        }
        experiment.replicated["output"] = found["output"]
        run.restart()
        for _ in range(STEPS):
            run.step()
        scales = [p for name, p in run.model.named_parameters() if name.endswith("norm.weight")]
        experiment.replicated["scales"] = torch.cat([p.detach().flatten() for p in scales])
        run.restart()
        return figures

    size = sum(p.nbytes for p in run.model.parameters())
    experiment = Experiment(run.step, check, "training", trained_bytes=size)
    return experiment


def figures(case: TransformerCase, run: Run, problem: Problem, experiment, ceilings) -> dict:
    """For the result: memory, floor, and the model's counts with the matrix rate."""
    count = counts(case.config)
    state = [x for one in run.optimizer.state.values() for x in one.values()]
    return {
        "memory": {
            "weight_bytes": experiment.trained_bytes,
            "optimizer_bytes": sum(x.nbytes for x in state if isinstance(x, Tensor)),
        },
        "floor": None if ceilings is None else _floor(case, problem, experiment, ceilings),
        "paths": paths(case, run.model, case.batch * case.T),
        "model": {
            "parameters": count.parameters,
            "flops_per_token": count.flops_per_token,
            "flops_per_token_causal": count.flops_per_token_causal,
            "matrix_flops": ceilings and ceilings["matrix_flops"][case.dtype],
            "syncs": problem.plan(case).syncs,
        },
    }


def rates(case: TransformerCase, seconds: float, outcome: dict) -> dict:
    """Tokens of the batch a second; MFU of all ranks together; the plan's syncs."""
    model, tokens = outcome["model"], case.batch * case.T / seconds
    return {
        "syncs": model["syncs"],
        "tokens_per_s": tokens,
        "mfu": tokens * model["flops_per_token"] / (case.ranks * model["matrix_flops"]),
        "limit_fraction": outcome["floor"]["seconds"] / seconds,
    }


def _floor(case: TransformerCase, problem: Problem, experiment, ceilings) -> dict[str, float]:
    tokens = case.batch * case.T
    flops = counts(case.config).flops_per_token_causal * tokens / case.ranks
    moved = (1 + OPTIMIZER_PASSES["adam"]) * experiment.trained_bytes
    stream = tokens * case.width * case.torch_dtype.itemsize
    wire = 2 * problem.plan(case).syncs * all_reduce_wire(stream, case.ranks)
    terms = {
        "compute": flops / ceilings["matrix_flops"][case.dtype],
        "memory": moved / ceilings["copy_bytes_per_s"],
        "wire": wire / ceilings["link_bytes_per_s"] if wire else 0.0,
    }
    return {"seconds": max(terms.values()), **terms}


def _gradients(model: Decoder) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}
