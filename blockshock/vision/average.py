"""The exponential moving average of a model's parameters, which is evaluated instead of them.

    average += (1 − d) (parameter − average),   d = min(decay, (1 + step) / (10 + step))

d grows with the steps, so that the initial weights are forgotten in a short run as well. What a
rank holds of sharded parameters it averages by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Average:
    """The average of a module's parameters, in their dtypes."""

    @torch.no_grad()
    def __init__(self, module: nn.Module, decay: float):
        self.parameters, self.decay = list(module.parameters()), decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [p.detach() for p in self.parameters]
        torch._foreach_lerp_(self.values, now, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module's parameters are the average; what is loaded there becomes it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            before = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(before)
