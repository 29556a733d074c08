"""The data of a point: x, y and their true sum."""

from functools import cached_property

import torch

from blockshock.measure.errors import relative_error
from blockshock.phases.case import Case
from blockshock.sources import generator


class Problem:
    """x, y [n] on this rank's device; the same on every rank."""

    truth_dtype = torch.float64

    def __init__(self, case: Case, device: torch.device):
        self.device = device
        source = generator(device, "vector_sum", case.problem_seed)
        size = {"one": 1.0, "large": 1e4}[case.scale]
        both = torch.randn(2, case.n, generator=source, device=device) * size
        self.x, self.y = both.to(case.torch_dtype)

    @cached_property
    def output(self) -> tuple[torch.Tensor, float]:
        """The true sum, and the relative error of the plain one."""
        truth = self.x.double() + self.y.double()
        return truth, relative_error(self.x + self.y, truth)

    def warm_up(self) -> None:
        """One sum."""
        self.x + self.y

    def held_bytes(self) -> int:
        """Of all tensors."""
        return self.x.nbytes + self.y.nbytes
