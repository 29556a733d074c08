"""The 2:4 product Y = X Wᵀ for few rows of X, where reading W is all the work: `thin24.cu`.

    values   [N, K/2]            the kept entries, as everywhere
    indices  [N/16, K/64, 32]    int32: the codes of `masks` in the order in which the tensor cores
                                 take them; made from the mask once, an eighth of the values

A mask that is the same in every group of four columns and repeats after four rows (1100, tile)
needs no indices at all. Source of the instructions and of the layout of their operands: PTX ISA,
"wgmma.mma_async.sp" (Hopper) and "mma.sp" (elsewhere), m64nNk32 and m16n8k32 for 16-bit types.

N and K multiples of 64, bf16 or fp16, at most `MAX_BATCH` rows of X. The plain-PyTorch reference is
`sparse24.product_reference`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from blockshock.kernels import nvrtc

MAX_BATCH = 128
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}

# 128 rows of W a block of threads, four stages of 128 columns. Tried on H200: 4 and 8 warps, 1, 2
# and 4 tiles a warp, 3, 4 and 6 stages of 64 or 128 columns, splits of K, at N = 4096, 8192, 16384.
# These are the best, or within 2 % of it, at B = 64 and 128; at N = 16384, B = 16, 4 warps take 3 %
# less.
WARPS, TILES = 8, 1
PIPELINES = ((4, 2), (3, 2), (2, 2), (4, 1), (3, 1), (2, 1))  # the first that fits shared memory
ROWS = WARPS * TILES * 16


@dataclass(frozen=True)
class Layout:
    """What the kernel needs of a mask: its indices, or the four codes of a periodic one."""

    indices: Tensor | None
    codes: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.indices is None else self.indices.nbytes


def unsupported(dtype: torch.dtype, device_type: str) -> str | None:
    """Why the kernel cannot run, or None when it can."""
    if device_type != "cuda":
        return (
            f"the thin 2:4 kernel is CUDA code, and the layer is on the {device_type}; use 'auto'"
        )
    if dtype not in DTYPES:
        return f"the thin 2:4 kernel takes bf16 or fp16, got {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the thin 2:4 kernel needs sparse tensor cores (compute capability 8.0 or newer)"
    if not nvrtc.available():
        return "the thin 2:4 kernel needs NVRTC, which a CUDA build of PyTorch brings"
    return None


def layout(codes: Tensor, period: tuple[int, int, int, int] | None) -> Layout:
    """From a mask's codes, uint8 [N, K/4] on CUDA, and their period (`masks.period`)."""
    if period is None:
        return Layout(arrange_indices(codes), 0)
    return Layout(None, sum(code << 4 * row for row, code in enumerate(period)))


def arrange_indices(codes: Tensor) -> Tensor:
    """codes uint8 [N, K/4] -> indices int32 [N/16, K/64, 32].

    Lane 4g + 2s + u of a tile of 16 rows × 64 columns holds, four bits each, the codes of the
    groups 4q + 2s + u (q = 0..3) of row g, and above them those of row g + 8.
    """
    N, groups = codes.shape
    indices = torch.empty(N // 16, groups // 16, 32, dtype=torch.int32, device=codes.device)
    shifts = torch.arange(0, 32, 4, device=codes.device).view(2, 1, 1, 4, 1, 1)  # half, q
    step = max(1, (1 << 22) // groups)  # tiles at once: the words are wide on the way
    for at in range(0, N // 16, step):
        some = codes[at * 16 : (at + step) * 16]
        code = some.view(-1, 2, 8, groups // 16, 4, 2, 2).long()  # tile, half, g, block, q, s, u
        words = (code << shifts).sum((1, 4)).permute(0, 2, 1, 3, 4)  # tile, block, g, s, u
        words = words.reshape(-1, groups // 16, 32)
        indices[at : at + step] = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return indices


def product(x: Tensor, values: Tensor, places: Layout, bias: Tensor | None = None) -> Tensor:
    """X Wᵀ + b: x [B, K], B at most MAX_BATCH, values [N, K/2], bias [N] -> [B, N], contiguous.

    The sums are float32, in an order that depends on the shapes alone. Raises ValueError for x that
    is not on the current CUDA device, and for more rows.
    """
    (batch, K), N = x.shape, values.shape[0]
    if batch == 0:
        return x.new_empty(0, N)
    if batch > MAX_BATCH:
        raise ValueError(f"{batch} rows: the thin 2:4 kernel takes at most {MAX_BATCH}")
    nvrtc.check_device(x)
    if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 8:
        x = x.clone(memory_format=torch.contiguous_format)  # of one row `contiguous` copies nothing
    batch_tiles = -(-batch // 8)
    pipeline = _pipeline(batch_tiles)
    tiles, split = -(-N // ROWS), _split(N, K, pipeline, x.device)
    deal_out, multiply = _kernels(
        x.dtype, batch_tiles, places.indices is not None, bias is not None
    )
    dealt = x.new_empty(K * batch_tiles * 8)
    y = x.new_empty(batch, N)
    parts = dealt  # not used without a split
    if split > 1:
        parts = x.new_empty(tiles * split * ROWS * batch_tiles * 8, dtype=torch.float32)
    counters = x.new_empty(tiles, dtype=torch.int32)
    deal_out((K // 64, 1, 1), (256, 1, 1), [x, dealt, counters, tiles, batch, x.stride(0)])
    indices = dealt if places.indices is None else places.indices
    added = dealt if bias is None else bias.contiguous()  # dealt: not read
    arguments = [values, indices, dealt, added, y, parts]
    arguments += [counters, N, K, batch, places.codes]
    shared = _shared_bytes(batch_tiles, *pipeline)
    multiply((tiles, split, 1), (WARPS * 32, 1, 1), arguments, shared)
    return y


def _split(N: int, K: int, pipeline: tuple[int, int], device: torch.device) -> int:
    """Parts of K that are summed side by side, so that every processor has a tile of rows."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    stages, blocks = pipeline
    return max(1, min(processors // -(-N // ROWS), K // 64 // blocks // stages))


@nvrtc.once_per_device
def _pipeline(batch_tiles: int) -> tuple[int, int]:
    """Stages, and blocks of 64 columns in each. The last one fits every GPU with sparse tensor
    cores."""
    most = torch.cuda.get_device_properties().shared_memory_per_block_optin
    return next(p for p in PIPELINES if _shared_bytes(batch_tiles, *p) <= most)


def _hopper() -> bool:
    """Whether `wgmma.sp` is there; else `mma.sp` is used."""
    return torch.cuda.get_device_capability()[0] == 9


@nvrtc.once_per_device
def _kernels(dtype: torch.dtype, batch_tiles: int, indices: bool, bias: bool):
    hopper, (stages, blocks) = _hopper(), _pipeline(batch_tiles)
    macros = {
        "HALF": int(dtype == torch.float16),
        "NT": batch_tiles,
        "MT": TILES,
        "WARPS": WARPS,
        "STAGES": stages,
        "KB": blocks,
        "INDICES": int(indices),
        "BIAS": int(bias),
        "WGMMA": int(hopper),
    }
    prelude = _multiply_source(dtype, batch_tiles) if hopper else ""
    shared = {"deal_out": 0, "product": _shared_bytes(batch_tiles, stages, blocks)}
    return [
        nvrtc.kernel("thin24.cu", name, shared[name], prelude, **macros)
        for name in ("deal_out", "product")
    ]


def _shared_bytes(batch_tiles: int, stages: int, blocks: int) -> int:
    values, indices = TILES * 2 * WARPS * 32 * 16, TILES * WARPS * 32 * 4
    ring = stages * blocks * (values + indices + batch_tiles * 1024)
    return max(ring, batch_tiles * 8 * (ROWS + 8) * 2)  # at the end the tile of the output


def _multiply_source(dtype: torch.dtype, batch_tiles: int) -> str:
    """The wrapper of `wgmma.sp`: how many operands it has depends on the rows of X."""
    n, name = batch_tiles * 4, DTYPES[dtype]
    sums = ", ".join(f"%{i}" for i in range(n))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(n))
    return f"""
template <int SELECTOR>
__device__ __forceinline__ void multiply(
    float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long b,
    unsigned indices) {{
    asm volatile(
        "wgmma.mma_async.sp.sync.aligned.m64n{batch_tiles * 8}k32.f32.{name}.{name} {{{sums}}}, "
        "{{%{n}, %{n + 1}, %{n + 2}, %{n + 3}}}, %{n + 4}, %{n + 5}, %{n + 6}, 1, 1, 1, 0;"
        : {outputs}
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(indices), "n"(SELECTOR));
}}"""
