"""What ranks run for tests/test_data_parallel_laboratory.py."""

from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from blockshock.distributed.ranks import device
from blockshock.measure.errors import relative_error
from blockshock.phases import engine
from blockshock.phases.data_parallel import steps
from blockshock.phases.data_parallel.case import DataParallelCase
from blockshock.phases.data_parallel.problem import MAX_NORM, OPTIMIZER, STEPS, Problem

TINY = {"width": 32, "depth": 1, "batch": 2, "T": 16, "vocabulary": 256, "dtype": "fp32"}


def case(phase="training", method="flat", **changed):
    return DataParallelCase(phase, method, **{**TINY, **changed})


@contextmanager
def fault(kind):
    """The method `naive` goes wrong in one way."""
    cls = DataParallelCase.methods["naive"]
    last = dist.get_rank() == dist.get_world_size() - 1

    class Faulty(cls):
        def forward(self, tokens, targets):
            if kind != "the last sequence is lost" or not last:
                return super().forward(tokens, targets)
            return super().forward(tokens[:-1], targets[:-1]) * (1 - 1 / len(tokens))

        def finish_gradient_sync(self):
            parameters = list(self.module.parameters())
            if kind == "a rank forgets a tensor" and last:
                parameters[-1].grad.zero_()
            if kind == "a rank forgets a bias" and last:
                self.module.blocks[0].down.bias.grad.zero_()
            super().finish_gradient_sync()
            for parameter in parameters:
                if kind == "sum, no mean":
                    parameter.grad.mul_(self.ranks)
                if kind == "1% too long":
                    parameter.grad.mul_(1.01)
                if kind == "a bucket is doubled" and parameter.dim() == 1:
                    parameter.grad.mul_(2)
                if kind == "a tensor is lost" and parameter.dim() == 1:
                    parameter.grad.zero_()

    DataParallelCase.methods["naive"] = Faulty
    try:
        yield
    finally:
        DataParallelCase.methods["naive"] = cls


def wrong(kind, dtype):
    """By figure, what the check of a method with a fault finds."""
    one = case("correctness", "naive", dtype=dtype)
    if "bias" in kind:  # which no sweep asks for
        one.__dict__["config"] = replace(one.config, bias=True)
    with fault(kind):
        problem = Problem(one, device())
        figures = steps.correctness(one, steps.Run(one, problem), problem).check()
    return {name: figure.faults() for name, figure in figures.items()}


def outcomes(kind, options):
    """What the laboratory says of a method with a fault, and of one without beside it."""
    with fault(kind):
        point = [case(method="naive"), case(method="none")]
        return engine.measure_point(point, options)


def truth_of_one_process(ranks):
    """Relative differences of the truths from those of a model that has all sequences at once."""
    one = case(ranks=ranks)
    problem = Problem(one, device())
    gradient, update = problem.gradient(whole=True, cast=False)[0], problem.update(cast=False)[0]
    model = problem._plain(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    errors = []
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens = problem.tokens[step]
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        if step == 0:
            own = torch.cat([p.grad.flatten() for p in model.parameters()])
            errors.append(relative_error(own, gradient))
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    own = problem.flat(model.state_dict()) - problem.start
    return [*errors, relative_error(own, update)]
