"""The 2:4 product Y = X Wᵀ for many rows of X on Hopper, W from registers: `wide24.cu`.

    values    [N, K/2]              the kept entries, as everywhere
    places    [N/64, K/64, 128]     int32: the codes of `masks` in the order in which `wgmma.sp`
                                    takes them; made from the mask once, an eighth of the values

N and K multiples of 64, bf16 or fp16, any number of rows of X. The plain-PyTorch reference is
`sparse24.product_reference`; the order of `places` is a function here, in plain PyTorch as well.
Source: PTX ISA, "wgmma.mma_async.sp", m64nNk32 for 16-bit types.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blockshock.kernels import nvrtc, tensor_maps

# Gives, for the bytes of a partial, the buffers in which two ranks add (`symmetric.Partials`).
Buffers = Callable[[int], object]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
# The constants of `wide24.cu`; its header explains them, and has the rates of others.
GROUPS, CLUSTER, BAND, COPIER, MULTIPLIER = 2, 2, 8, 120, 192
THREADS = (GROUPS + 1) * 128
ROWS = CLUSTER * GROUPS * 64  # of W, of a cluster's tile


@dataclass(frozen=True)
class Tile:
    """columns: rows of X of a tile. cost: of a tile beside others."""

    columns: int
    stages: int
    cost: float

    @property
    def shared_bytes(self) -> int:
        """Stages with their barriers, counts, and room to align them."""
        stage = self.columns * 128 + GROUPS * (4096 + 512) + 16
        return self.stages * stage + 16 + 1024


# Of 16 rows of W: which is row i of an instruction's A (`row_of_w`).
ROWS_OF_W = [4 * (i % 8 // 2) + 2 * (i % 8 // 4 ^ i // 8) + i % 2 for i in range(16)]
# By times of an H200. Half a tile takes more than half the time: as much of W is read.
TILES = Tile(256, 5, 1.0), Tile(128, 9, 0.68)
H200_CLUSTERS = 66  # that run at once


def unsupported(dtype: torch.dtype, device_type: str) -> str | None:
    """Why the kernel cannot run, or None when it can."""
    if device_type != "cuda":
        return f"the wide 2:4 kernel is CUDA code; the layer is on the {device_type}: use 'auto'"
    if dtype not in DTYPES:
        return f"the wide 2:4 kernel takes bf16 or fp16, got {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability() != (9, 0):
        return "the wide 2:4 kernel needs a Hopper GPU (compute capability 9.0); use 'auto'"
    if not nvrtc.available():
        return "the wide 2:4 kernel needs NVRTC, which a CUDA build of PyTorch brings"
    return None


def arrange_places(codes: Tensor) -> Tensor:
    """codes uint8 [N, K/4] -> places int32 [N/64, K/64, 128].

    Word 32w + 4g + 2s + u of a tile of 64 rows × 64 columns holds, four bits each, the codes of
    groups 8s + 4u + 0..3 of row g of the warp's A, and above them those of row g + 8.
    """
    N, groups = codes.shape
    places = torch.empty(N // 64, groups // 16, 128, dtype=torch.int32, device=codes.device)
    shifts = torch.arange(0, 32, 4, device=codes.device).view(2, 1, 1, 1, 1, 4)  # half, of four
    step = max(1, (1 << 20) // groups)  # tiles at once: the words are wide on the way
    for at in range(0, N // 64, step):
        some = codes[at * 64 : (at + step) * 64]
        of_a = some.view(-1, 4, 16, groups)[:, :, ROWS_OF_W]
        code = of_a.view(-1, 4, 2, 8, groups // 16, 2, 2, 4).long()  # t, w, half, g, b, s, u, j
        words = (code << shifts).sum((2, 7)).permute(0, 3, 1, 2, 4, 5)  # t, b, w, g, s, u
        words = words.reshape(-1, groups // 16, 128)
        places[at : at + step] = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return places


def product(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    bias: Tensor | None = None,
    partials: Buffers | None = None,
) -> Tensor:
    """X Wᵀ + b: x [B, K], values [N, K/2], places of `arrange_places`, bias [N] -> [B, N].

    values are contiguous, and so is the result. The sums are float32, in the order of K. Raises
    ValueError for x that is not on the current CUDA device.

    partials: of two ranks that call this together, with at least 128 rows. Each rank's product is
    rounded, and the sum of both, the same bits on both, is the result.
    """
    (batch, K), N = x.shape, len(values)
    if batch == 0:
        return x.new_empty(0, N)
    nvrtc.check_device(x)
    if not tensor_maps.aligned(x):
        x = x.clone(memory_format=torch.contiguous_format)
    y = x.new_empty(batch, N)
    sums, biased = partials is not None, bias is not None
    # Two ranks take the same tile and the same grid, whatever GPU each has.
    kinds = {t: H200_CLUSTERS if sums else _clusters(x.dtype, biased, t) for t in TILES}
    tile = best(N, batch, kinds)
    target, more = y, []
    if sums:
        buffers = partials(y.nbytes)
        target, other = buffers.of(batch, N, x.dtype)
        flags = buffers.flags, buffers.their_flags
        more = [other, buffers.nbytes // 128, y, *flags, buffers.state]
    maps = [
        tensor_maps.tensor_map(x, (tile.columns // CLUSTER, 64), 128),
        tensor_maps.tensor_map(values, (GROUPS * 64, 32), 64),
        tensor_maps.tensor_map(places, (GROUPS, 1, 128)),
    ]
    rows, columns = -(-N // ROWS), -(-batch // tile.columns)
    blocks = min(rows * columns, kinds[tile]) * CLUSTER
    added = y if bias is None else bias.contiguous()  # y: not read
    arguments = [*maps, target, added, batch, N // 64, K // 64, rows, columns, *more]
    kernel = _kernel(x.dtype, biased, tile, sums=sums)
    tensor_maps.launch(kernel, blocks, THREADS, arguments, tile.shared_bytes)
    return y


def best(N: int, batch: int, clusters: dict[Tile, int]) -> Tile:
    """The tile that takes the least time for all rounds. clusters: how many of each run at once."""

    def cost(tile: Tile) -> float:
        tiles = -(-N // ROWS) * -(-batch // tile.columns)
        return tile.cost * -(-tiles // clusters[tile])

    return min(clusters, key=cost)


@nvrtc.once_per_device
def _clusters(dtype: torch.dtype, bias: bool, tile: Tile) -> int:
    """Clusters that run at once: the kernel stays and takes tile after tile."""
    kernel = _kernel(dtype, bias, tile, sums=False)
    return tensor_maps.most_clusters(kernel, CLUSTER, THREADS, tile.shared_bytes)


@nvrtc.once_per_device
def _kernel(dtype: torch.dtype, bias: bool, tile: Tile, *, sums: bool):
    prelude, constants = prelude_of(dtype, tile), macros(dtype, bias, tile, sums=sums)
    return nvrtc.kernel("wide24.cu", "product", tile.shared_bytes, prelude, **constants)


def macros(dtype: torch.dtype, bias: bool, tile: Tile, *, sums: bool = False) -> dict[str, int]:
    """The compile-time constants of `wide24.cu`."""
    return {
        "HALF": int(dtype == torch.float16),
        "BIAS": int(bias),
        "SUM": int(sums),
        "GROUPS": GROUPS,
        "COLUMNS": tile.columns,
        "STAGES": tile.stages,
        "CLUSTER": CLUSTER,
        "BAND": BAND,
        "COPIER": COPIER,
        "MULTIPLIER": MULTIPLIER,
    }


def prelude_of(dtype: torch.dtype, tile: Tile) -> str:
    """What stands before `wide24.cu`: `hopper.cu`, and the wrapper of `wgmma.sp`, whose number of
    operands depends on the rows of X."""
    n, name = tile.columns // 2, DTYPES[dtype]
    sums = ", ".join(f"%{i}" for i in range(n))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(n))
    instructions = (nvrtc.FOLDER / "hopper.cu").read_text(encoding="utf-8")
    return f"""{instructions}
template <int SELECTOR>
__device__ __forceinline__ void multiply(
    float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long b,
    unsigned codes, int add) {{
    asm volatile(
        "{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{n + 7}, 0;\\n"
        "wgmma.mma_async.sp.sync.aligned.m64n{tile.columns}k32.f32.{name}.{name} {{{sums}}}, "
        "{{%{n}, %{n + 1}, %{n + 2}, %{n + 3}}}, %{n + 4}, %{n + 5}, %{n + 6}, add, 1, 1, 0;\\n}}"
        : {outputs}
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(codes), "n"(SELECTOR), "r"(add));
}}"""
