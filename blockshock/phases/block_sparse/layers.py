"""A layer Y = act(X Wᵀ + b), W [N, K] by its kept tiles: forward, or forward and backward.

    forward     Y, nothing recorded for a backward
    backward    Y, then dX, the gradient of what the method holds of W, and db

The truth is the dense layer of the weight that a method holds, in float64: the tiles that the mask
keeps, and for `semi_structured` the largest two of every four entries of them. The yardstick is the
same in the case's own dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockshock import masks
from blockshock.block_sparse import METHODS, BlockSparseLinear, plans, tiles
from blockshock.kernels.block_product import ACTIVATIONS
from blockshock.measure.errors import Figure, figure, relative_error
from blockshock.measure.floor import step_floor
from blockshock.measure.regions import region
from blockshock.phases.block_sparse.case import BlockSparseCase
from blockshock.phases.experiment import Experiment
from blockshock.sources import generator

SAME = 1e-5  # a relative error that passes in fp32: sums in another order
BOUNDS = {"torch_bsr": 1.5}  # times the yardstick's error: it rounds before it adds the bias
FORWARD, BACKWARD = ("Y",), ("Y", "dX", "dW")  # the products of a step


class Problem:
    """weight [N, K], bias [N] or None, x [B, K], dy [B, N] in the case's dtype; mask: tiles kept,
    the largest by the mean of |W|, bool [⌈N / b⌉, ⌈K / b⌉].
    """

    truth_dtype = torch.float64

    def __init__(self, case: BlockSparseCase, device: torch.device):
        self.case, self.device = case, device
        self.square = case.block, case.block

        def drawn(name, *size, scale=1.0):
            source = generator(device, f"block_sparse/{name}", case.problem_seed)
            made = torch.randn(size, generator=source, device=device)
            return made.mul_(scale).to(case.torch_dtype)

        self.weight = drawn("weight", case.N, case.K, scale=case.K**-0.5)
        self.bias = drawn("bias", case.N) if case.bias else None
        self.x, self.dy = drawn("x", case.B, case.K), drawn("dy", case.B, case.N)
        scores = tiles.magnitude(self.weight, self.square)
        self.mask = tiles.keep_top(scores, case.sparsity)
        self.kept = tiles.kept(self.mask.numel(), case.sparsity)
        self._truths: dict[bool, dict[str, tuple[Tensor, Tensor]]] = {}

    def warm_up(self) -> None:
        """A product, so that the library's workspace is not counted as the first case's memory."""
        x = self.x[:8]
        x @ x.t()

    def held(self, halved: bool) -> Tensor:
        """The weight [N, K] without the tiles that are dropped; halved: two of every four of it."""
        pruned = tiles.masked(self.weight, self.mask, self.square)
        return pruned * masks.make("magnitude", pruned) if halved else pruned

    def truth(self, method: str) -> dict[str, tuple[Tensor, Tensor]]:
        """By result: (the true one, the yardstick's). `weight` is dense [N, K]."""
        halved = method == "semi_structured"
        if halved not in self._truths:
            weight = self.held(halved)
            true, plain = (self._dense(weight, t) for t in (self.truth_dtype, weight.dtype))
            self._truths[halved] = {name: (true[name], plain[name]) for name in true}
        return self._truths[halved]

    def _dense(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        backward = self.case.phase == "backward"
        given = {"grad_input": self.x, "weight": weight, "grad_bias": self.bias}
        given = {n: None if t is None else t.to(dtype, copy=True) for n, t in given.items()}
        inputs = {n: t.requires_grad_(backward) for n, t in given.items() if t is not None}
        y = ACTIVATIONS[self.case.activation](F.linear(*given.values()))
        found = {"output": y.detach()}
        if backward:
            gradients = torch.autograd.grad(y, [*inputs.values()], self.dy.to(dtype))
            found |= dict(zip(inputs, gradients, strict=True))
        return found


def build(case: BlockSparseCase, problem: Problem) -> nn.Module:
    """The layer of the point's weight and mask."""
    return METHODS[case.method].from_dense(
        problem.weight,
        problem.bias,
        block=case.block,
        mask=problem.mask,
        activation=case.activation,
    )


def forward(case: BlockSparseCase, layer: nn.Module, problem: Problem) -> Experiment:
    """A forward of a layer, nothing recorded for a backward."""

    def step():
        with torch.no_grad(), region("forward"):
            return layer(problem.x)

    def check():
        return {"output": _figure(case, step(), *problem.truth(case.method)["output"])}

    return Experiment(step, check, "forward")


def backward(case: BlockSparseCase, layer: nn.Module, problem: Problem) -> Experiment:
    """A forward of a layer, and the gradients of its input, of what it holds, and of its bias."""
    x = problem.x.clone().requires_grad_()
    parameters = dict(layer.named_parameters())

    def step():
        with region("forward"):
            y = layer(x)
        with region("backward"):
            gradients = torch.autograd.grad(y, [x, *parameters.values()], problem.dy)
        return y.detach(), *gradients

    def check():
        y, dx, *of_parameters = step()
        truth = dict(problem.truth(case.method))
        true, plain = (layer.restrict(t) for t in truth.pop("weight"))
        truth |= {f"grad_{name}": (true[name], plain[name]) for name in true}
        found = {"output": y, "grad_input": dx}
        names = (f"grad_{name}" for name in parameters)
        found |= dict(zip(names, of_parameters, strict=True))
        return {name: _figure(case, found[name], *truth[name]) for name in truth}

    size = sum(p.nbytes for p in parameters.values())
    return Experiment(step, check, "correctness", trained_bytes=size)


def figures(
    case: BlockSparseCase, layer: nn.Module, problem: Problem, experiment, ceilings
) -> dict:
    """For the result: memory, work of one product, floor, paths."""
    cost, floor = layer.cost(case.B), None
    if ceilings is not None:
        floor = step_floor(
            cost,
            ceilings,
            phase=experiment.products,
            dtype=case.dtype,
            trained_bytes=experiment.trained_bytes,
        )
    estimated, actual = _weight_bytes(layer)
    return {
        "memory": {"weight_bytes": actual, "weight_bytes_estimated": estimated},
        "work": {
            "flops": cost.flops,
            "weight_bytes": cost.weight_bytes,
            "activation_bytes": cost.activation_bytes,
            "kept_tiles": problem.kept,
            "tiles": problem.mask.numel(),
        },
        "floor": floor,
        "paths": paths(layer, case.B, _products(case)),
    }


def paths(layer: nn.Module, rows: int, products: tuple[str, ...] = FORWARD) -> dict[str, str]:
    """What runs for so many rows, and the plans of our kernel."""
    told = layer.paths(rows) if hasattr(layer, "paths") else {}
    if not isinstance(layer, BlockSparseLinear) or not layer.by_triton(layer.values):
        return told
    shape, x = (layer.out_features, layer.in_features), layer.values.new_empty(rows, 0)
    for product in products:
        plan = plans.chosen(product, shape, layer.lists, layer.block, x)
        told[f"plan of {product}"] = str(plan)
    return told


def rates(case: BlockSparseCase, seconds: float, outcome: dict) -> dict:
    """Tokens are rows of the input. The dense-equivalent rate counts what the dense layer computes:
    2·B·N·K for each product of the phase."""
    products = len(_products(case))
    return {
        "tokens_per_s": case.B / seconds,
        "dense_tflops": products * 2 * case.B * case.N * case.K / seconds / 1e12,
        "limit_fraction": outcome["floor"]["seconds"] / seconds,
    }


def _products(case: BlockSparseCase) -> tuple[str, ...]:
    return BACKWARD if case.phase == "backward" else FORWARD


def _figure(case: BlockSparseCase, actual: Tensor, true: Tensor, plain: Tensor) -> Figure:
    enough = SAME if case.dtype == "fp32" else 0.0
    bound = BOUNDS.get(case.method)
    return figure(actual, true, relative_error(plain, true), bound=bound, enough=enough)


def _weight_bytes(layer: nn.Module) -> tuple[int, int]:
    """(estimated, actual) bytes of what a layer holds of its weight."""
    if hasattr(layer, "weight_bytes"):
        return layer.weight_bytes()
    return layer.weight.nbytes, layer.weight.nbytes
