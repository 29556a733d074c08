"""A backward that has no backward of its own says so.

`torch.autograd.function.once_differentiable` refuses only where the incoming gradient is itself
differentiable. For `loss = out.sum()` it is not, and the gradients then come back as constants: a
penalty on them would be left out of the training without a word.
"""

import torch
from torch import Tensor


def first_only(gradients: tuple[Tensor, ...], *sources: Tensor) -> tuple[Tensor, ...]:
    """The gradients, as they are; differentiating them raises RuntimeError.

    sources: what they were computed of. To be used at the end of an autograd function's backward,
    whose own work is done under `torch.no_grad()`.
    """
    if not torch.is_grad_enabled():  # no create_graph=True: nobody can ask
        return gradients
    return _FirstOnly.apply(len(gradients), *gradients, *sources)


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *second):
        raise RuntimeError(
            "this attention has no second derivative (a gradient of its gradients was asked for); "
            "use the method reference there"
        )
