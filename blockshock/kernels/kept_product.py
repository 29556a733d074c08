"""The entries of a dense product that a 2:4 mask keeps:  out = kept( dYᵀ X ).

dy [B, N], x [B, K], codes [N, K/4] (see `pack`), out [N, K/2]. This is the weight gradient of a
term whose mask has no period. Either the whole product is made and its kept entries are gathered,
or a Triton kernel keeps them in its epilogue and the whole product is never written. The kernel
multiplies more slowly than cuBLAS and spares the gather. Its time over that of product and gather,
bf16 and fp16, one H200, replayed graphs:

    N = K     B = 64   256    1024   4096
    4096      0.77     0.77   0.90   0.96
    8192      0.80     0.85   0.90   0.96 (fp16 1.00)
    16384     0.82     0.88   0.90   0.98
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
    """Whether the kernel makes the product of so many rows: on Hopper and like GPUs."""
    return 0 < rows <= MAX_ROWS and dtype in DTYPES and device.type == "cuda" and _fits(device)


def kept_product(dy: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """kept(dYᵀ X): dy [B, N] and x [B, K] of one dtype, any strides -> [N, K/2]."""
    if not fused(len(dy), dy.dtype, dy.device):
        return kept_product_reference(dy, x, codes)
    from blockshock.kernels import kept_product_triton  # no Triton beside PyTorch's CPU build

    return kept_product_triton.kept_product(dy, x, codes)


@cache
def _fits(device: torch.device) -> bool:
    """A memory accelerator, and shared memory for three stages of tiles (197 kB on an H200)."""
    facts = torch.cuda.get_device_properties(device)
    return facts.major >= 9 and facts.shared_memory_per_block_optin >= 200_000
