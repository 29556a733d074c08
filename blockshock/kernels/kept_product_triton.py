"""The Triton kernel behind `blockshock.kernels.kept_product`.

A persistent grid over tiles [TILE_N, TILE_K] of dYᵀ X, operands by the memory accelerator. The
epilogue rounds the float32 sums and selects two of every four in registers, as `pack` does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# The fastest of five tiles, with `flatten` and without, at N = 8192 and 16384, B = 1024 and 4096
# (H200, bf16).
TILE_N, TILE_K, TILE_B, STAGES, WARPS, GROUP = 128, 256, 64, 3, 8, 8


@triton.jit
def _kept_product(
    dy,
    x,
    codes,
    out,
    N,
    K,
    B,
    PROGRAMS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_B: tl.constexpr,
    GROUP: tl.constexpr,
):
    down, across = tl.cdiv(N, TILE_N), tl.cdiv(K, TILE_K)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        # GROUP tiles down before the next across, so that operands are found in L2.
        band = tile // (GROUP * across)
        height = min(down - band * GROUP, GROUP)
        n = (band * GROUP + tile % (GROUP * across) % height) * TILE_N
        k = tile % (GROUP * across) // height * TILE_K
        total = tl.zeros((TILE_N, TILE_K), tl.float32)
        for b in range(0, B, TILE_B):
            total = tl.dot(dy.load([b, n]).T, x.load([b, k]), total)  # rows past B are zeros
        whole = total.to(out.dtype)
        even, odd = tl.split(tl.reshape(whole, (TILE_N, TILE_K // 4, 2, 2)))  # 0, 2 and 1, 3
        d0, d2 = tl.split(even)
        d1, d3 = tl.split(odd)
        row = n + tl.arange(0, TILE_N)[:, None]
        group = k // 4 + tl.arange(0, TILE_K // 4)[None, :]
        inside = (row < N) & (group < K // 4)
        code = tl.load(codes + row.to(tl.int64) * (K // 4) + group, inside, 4)
        i0 = code & 3
        i1 = code >> 2
        v0 = tl.where(i0 == 0, d0, tl.where(i0 == 1, d1, d2))  # i0 < i1, so i0 is never 3
        v1 = tl.where(i1 == 1, d1, tl.where(i1 == 2, d2, d3))  # and i1 never 0
        out.store([n, k // 2], tl.interleave(v0, v1))


def kept_product(dy: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """dy [B, N], x [B, K], codes [N, K/4] -> [N, K/2]; B > 0, N and K multiples of 64."""
    (B, N), K = dy.shape, x.shape[1]
    out = torch.empty(N, K // 2, dtype=dy.dtype, device=dy.device)
    tiles = triton.cdiv(N, TILE_N) * triton.cdiv(K, TILE_K)
    programs = min(tiles, _processors(dy.device))
    with torch.cuda.device_of(out):
        _kept_product[(programs,)](
            TensorDescriptor.from_tensor(_aligned(dy), [TILE_B, TILE_N]),
            TensorDescriptor.from_tensor(_aligned(x), [TILE_B, TILE_K]),
            codes.contiguous(),
            TensorDescriptor.from_tensor(out, [TILE_N, TILE_K // 2]),
            N,
            K,
            B,
            PROGRAMS=programs,
            TILE_N=TILE_N,
            TILE_K=TILE_K,
            TILE_B=TILE_B,
            GROUP=GROUP,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return out


def _aligned(t: Tensor) -> Tensor:
    """Itself where the memory accelerator can read it: unit stride, 16-byte rows and start."""
    size = t.element_size()
    fits = t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) * size % 16 == 0
    return t if fits and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # under Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
