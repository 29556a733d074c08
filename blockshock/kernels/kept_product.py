"""The entries of a dense product that a 2:4 mask keeps:  out = kept( dYᵀ X ).

dy [B, N], x [B, K], codes [N, K/4] (see `pack`), out [N, K/2]. This is the weight gradient of a
term whose mask has no period. Either the whole product is made and its kept entries are gathered,
or a Triton kernel keeps them in its epilogue and the whole product is never written. The kernel
multiplies more slowly than cuBLAS and spares the gather: its time over that of product and gather
was 0.77 to 0.87 at B ≤ 256, 0.90 at 1024, and 0.96 to 1.00 at 4096, where the measuring ended (N =
4096 to 16384, bf16 and fp16, H200).
"""

from functools import cache

import torch
from torch import Tensor

from blockshock.kernels import pack

DTYPES = (torch.bfloat16, torch.float16)
MAX_ROWS = 4096


def kept_product_reference(dy: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """The whole product, then its kept entries."""
    return pack.gather_kept(dy.t() @ x, codes)


def fused(rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel makes the product of so many rows: on Hopper and later, up to MAX_ROWS."""
    return 0 < rows <= MAX_ROWS and dtype in DTYPES and device.type == "cuda" and _has_tma(device)


def kept_product(dy: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """kept(dYᵀ X): dy [B, N] and x [B, K] of one dtype, any strides -> [N, K/2]."""
    if not fused(len(dy), dy.dtype, dy.device):
        return kept_product_reference(dy, x, codes)
    from blockshock.kernels import kept_product_triton  # no Triton beside PyTorch's CPU build

    return kept_product_triton.kept_product(dy, x, codes)


@cache
def _has_tma(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
