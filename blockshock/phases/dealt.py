"""A truth that all ranks compute together: whole batches, of which each rank has some sequences.

    rank r has the sequences r, r + R, r + 2R, …        gradient = Σ_r gradient_r, in float64

A rank's part of a method's batch is consecutive, so a fault in one rank's part is not repeated
here. Gradients are gathered and then added: no method's way of adding takes part in its own truth.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from blockshock.distributed import collectives


def own_rows(rows: Tensor) -> tuple[Tensor, ...]:
    """This rank's rows of [rows, ...], each as [1, ...]; perhaps none."""
    return rows[collectives.group_rank() :: collectives.group_size()].unsqueeze(1).unbind()


def add_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Puts the sum over the ranks in the place of each gradient, None counting as zeros.

    The same bits on every rank. A collective.
    """
    for p in parameters:
        own = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = collectives.all_gather(own).sum(0, dtype=torch.float64).to(p.dtype)
