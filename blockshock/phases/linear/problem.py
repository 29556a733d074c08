"""What the methods of one point share inside a rank: weight, input, upstream gradient, and truth.

    Y = X Wᵀ + b,  dX = dY W,  dW = dYᵀ X,  db = Σ dY      in float64, W read in row blocks

Truth is float64 as long as the weight has at most 2^29 entries, float32 beyond (said in the
results as `truth`). Beside it stands the yardstick: the same in the case's own dtype by plain
dense products.
"""

import math
from functools import cached_property

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from blockshock import sources, workloads
from blockshock.measure.errors import relative_error
from blockshock.phases.linear.case import LinearCase

FLOAT64_ENTRIES = 2**29


class Problem:
    """The data of one point on this rank's device; the same bits on every rank."""

    def __init__(self, case: LinearCase, device: torch.device):
        self.device, self.dtype, self.seed = device, case.torch_dtype, case.problem_seed
        self.N, self.K, self.B = case.N, case.K, case.B
        shared = {"dtype": self.dtype, "device": device, "seed": self.seed}
        self.weight = make_weight(case, **shared)
        self.bias = sources.seeded_bias(self.N, **shared) if case.bias else None
        self.x = _input(case.input, self.B, self.K, **shared)
        self.dy = workloads.make_target("normal", self.B, self.N, **shared)
        shared["seed"] += 1  # the upstream gradient is no copy of the target
        self.target = workloads.make_target(case.target, self.B, self.N, **shared)
        small = self.N * self.K <= FLOAT64_ENTRIES
        self.truth_dtype = torch.float64 if small else torch.float32

    def warm_up(self) -> None:
        """A product, so that the library's workspace is not counted as the first case's memory."""
        x = self.x[:8]
        x @ x.t()

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole W [N, K], for the yardstick; made anew each time and not kept."""
        whole = torch.empty(self.N, self.K, dtype=dtype or self.dtype, device=self.device)
        for start, stop in sources.row_blocks(self.N):
            whole[start:stop] = self.weight.rows(start, stop)
        return whole

    @cached_property
    def output(self) -> tuple[Tensor, float]:
        """The true Y [B, N], and the yardstick's relative error."""
        truth = self.true_forward(self.x)
        plain = F.linear(self.x, self.dense_weight(), self.bias)
        return truth, relative_error(plain, truth)

    @cached_property
    def grad_input(self) -> tuple[Tensor, float]:
        """The true dX [B, K] for the upstream gradient `dy`, and the yardstick's relative error."""
        truth = torch.zeros(self.B, self.K, dtype=self.truth_dtype, device=self.device)
        for start, stop in sources.row_blocks(self.N):
            truth += self.dy[:, start:stop].to(self.truth_dtype) @ self._true_rows(start, stop)
        return truth, relative_error(self.dy @ self.dense_weight(), truth)

    @cached_property
    def grad_bias(self) -> tuple[Tensor, float]:
        """The true db [N], and the yardstick's relative error."""
        truth = self.dy.to(self.truth_dtype).sum(0)
        return truth, relative_error(self.dy.sum(0), truth)

    @cached_property
    def grad_weight_error(self) -> float:
        """The yardstick's relative error of dW."""
        source, wrong, right = self.grad_weight, 0.0, 0.0
        for start, stop in sources.row_blocks(self.N):
            truth = source.rows(start, stop)
            plain = self.dy[:, start:stop].t() @ self.x
            wrong += (plain.to(self.truth_dtype) - truth).square().sum().item()
            right += truth.square().sum().item()
        return (wrong / right) ** 0.5

    @cached_property
    def grad_weight(self) -> "TrueWeightGradient":
        """The true dW [N, K] as a weight source, for a method's `restrict`."""
        return TrueWeightGradient(self.x, self.dy, self.truth_dtype)

    def true_forward(self, x: Tensor) -> Tensor:
        """X Wᵀ + b in the truth's dtype; x [B, K] of any dtype."""
        x = x.to(self.truth_dtype)
        y = torch.empty(x.shape[0], self.N, dtype=self.truth_dtype, device=self.device)
        for start, stop in sources.row_blocks(self.N):
            y[:, start:stop] = x @ self._true_rows(start, stop).t()
        return y if self.bias is None else y.add_(self.bias)

    @cached_property
    def steepness(self) -> float:
        """The largest eigenvalue of XᵀX / B over that of gaussian input, (1 + √(K/B))².

        By power iteration from a fixed start, in float32.
        """
        x = self.x.float()
        v = torch.ones(self.K, device=self.device)
        for _ in range(20):
            v = x.t() @ (x @ (v / v.norm())) / self.B
        return v.norm().item() / (1 + (self.K / self.B) ** 0.5) ** 2

    def _true_rows(self, start: int, stop: int) -> Tensor:
        return self.weight.rows(start, stop).to(self.truth_dtype)


class TrueWeightGradient:
    """dW = dYᵀ X as a weight source, computed in row blocks."""

    def __init__(self, x: Tensor, dy: Tensor, dtype: torch.dtype):
        self.shape = (dy.shape[1], x.shape[1])
        self.dtype, self.device = dtype, x.device
        self._x, self._dy = x.to(dtype), dy

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of dW."""
        return self._dy[:, start:stop].to(self.dtype).t() @ self._x


def make_weight(case: LinearCase, *, dtype: torch.dtype, device: torch.device, seed: int):
    """The case's weight as a source. Raises ValueError for a file that does not hold it."""
    if case.weight is None:
        return sources.SeededWeight(case.N, case.K, dtype=dtype, device=device, seed=seed)
    path, _, name = case.weight.partition(":")
    source = sources.FileWeight(path, name or None, dtype=dtype, device=device)
    if tuple(source.shape) != (case.N, case.K):
        raise ValueError(
            f"the weight in {case.weight} is {tuple(source.shape)}, the case has N = {case.N}, "
            f"K = {case.K}; set N and K to the file's"
        )
    return source


def check_data(case: LinearCase) -> None:
    """Raises ValueError, or ImportError, for a weight or an input that cannot be made.

    What files hold is not read, and inputs are tried with one row.
    """
    small = {"dtype": torch.float32, "device": torch.device("cpu"), "seed": 0}
    make_weight(case, **small)
    kind, options = parse_input(case.input)
    if kind != "file":
        _input(case.input, 1, 64, **small)
        return
    file = sources.FileTensor(options["path"], options["name"])
    rows = math.prod(file.shape[:-1])
    if len(file.shape) < 2 or file.shape[-1] != case.K or rows < case.B:
        raise ValueError(
            f"{file} has shape {file.shape}, the case reads B = {case.B} rows of K = {case.K}; "
            "set K to the file's, and B not above its rows"
        )


def _input(text: str, B: int, K: int, **shared) -> Tensor:
    kind, options = parse_input(text)
    try:
        return workloads.make_input(kind, B, K, **shared, **options)
    except TypeError as error:
        raise ValueError(f"input {text!r} does not take these options: {error}") from None


def parse_input(text: str) -> tuple[str, dict]:
    """A case's input -> the workload's name and its options.

    "mlp:activation=silu+layer_norm=true", "file:acts.npy", "file:model.safetensors:layer.3".
    """
    kind, _, rest = text.partition(":")
    if kind == "file":
        path, _, name = rest.partition(":")
        return kind, {"path": path, "name": name or None}
    pairs = [option.partition("=") for option in rest.split("+") if option]
    try:
        return kind, {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError:
        raise ValueError(f"input {text!r} is not KIND:OPTION=VALUE+OPTION=VALUE") from None
