"""The 2:4 product Y = X Wᵀ by cuSPARSELt: rows padded, the algorithm chosen, the product run.

Which of the library's algorithms runs is chosen in `algorithms`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blockshock.kernels import algorithms, cusparselt, pack


def product_reference(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None = None
) -> Tensor:
    """X Wᵀ + b in plain PyTorch: W is expanded, then multiplied densely. x [B, K] -> [B, N]."""
    return F.linear(x, pack.expand(values, codes), bias)


def product(
    x: Tensor,
    compressed: Tensor | None,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """X Wᵀ + b by cuSPARSELt on CUDA, by `product_reference` on the CPU.

    x [B, K], compressed [N, 9K/16] (None on the CPU), values [N, K/2], codes [N, K/4].
    bias [N] or None. Returns [B, N], contiguous, in x's dtype. B is padded with zero rows to a
    multiple of 8.
    """
    if compressed is None:
        return product_reference(x, values, codes, bias)
    batch = x.shape[0]
    if batch == 0:
        return x.new_empty(0, compressed.shape[0])
    padding = -batch % cusparselt.BATCH_MULTIPLE
    x = F.pad(x, (0, 0, 0, padding)) if padding else x.contiguous()
    with torch.cuda.device_of(x):  # which a search is of
        algorithm = algorithms.choose(len(x), codes, x.dtype)
    y = cusparselt.run(x, compressed, bias, algorithm)
    return y[:batch].clone() if padding else y  # not a view: callers add to it in place
