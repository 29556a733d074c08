"""The 2:4 product Y = X Wᵀ for many rows of X on Hopper, W from registers: `wide24.cu`.

    values    [N, K/2]              the kept entries, as everywhere
    places    [N/64, K/64, 128]     int32: the codes of `masks` in the order in which `wgmma.sp`
                                    takes them; made from the mask once, an eighth of the values
    arranged  [N/64, K/32, 128, 8]  the values in the order in which registers take them; only for a
                                    plan that loads them past shared memory

N and K multiples of 64, bf16 or fp16, any number of rows of X. The plain-PyTorch reference is
`sparse24.product_reference`; the orders of `places` and `arranged` are functions here, in plain
PyTorch as well. Source: PTX ISA, "wgmma.mma_async.sp", m64nNk32 for 16-bit types.

`Operand` is what a matrix is to the kernel: its values, which others write, its places, and where
the plan asks for it the arranged values, which follow the values.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from blockshock.kernels import graphs, nvrtc, tensor_maps

DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
HELD, SHARED, DIRECT = 0, 1, 2  # where the values of a product come from
# Registers of a thread that copies and of one that multiplies, by groups: a block has 65536.
REGISTERS = {2: (40, 232), 3: (24, 160), 4: (32, 112)}


@dataclass(frozen=True)
class Plan:
    """How `wide24.cu` is compiled; its header explains the constants."""

    groups: int = 2
    columns: int = 256
    stages: int = 5
    cluster: int = 2
    values: int = SHARED
    sets: int = 2
    copiers: int = 1
    still: int = 0
    band: int = 8

    @property
    def arranges(self) -> bool:
        """Whether it takes `arrange` of the values, and not the values."""
        return self.values != SHARED

    @property
    def right(self) -> bool:
        """Whether the product is one: the other plans only measure what a part of it costs."""
        return self.values != HELD and not self.still

    @property
    def threads(self) -> int:
        """Threads of a block: the groups that multiply, and the one that copies."""
        return (self.groups + self.copiers) * 128

    @property
    def shared_bytes(self) -> int:
        """Stages, two pieces of Y for each group, barriers, and room to align them."""
        values = self.groups * 4096 if self.values == SHARED else 0
        stage = self.columns * 128 + values + self.groups * 512
        return self.stages * (stage + 16) + self.groups * 8192 + 1024


# The steps of the way, from simple to clever; each is compiled by itself.
PLANS = {
    "alone": Plan(cluster=1),
    "pairs": Plan(),
    "three": Plan(groups=3, stages=4, sets=1, copiers=0),
    "direct": Plan(stages=6, values=DIRECT, sets=4),
    "fours, direct": Plan(cluster=4, stages=6, values=DIRECT, sets=4, band=4),
    "three, direct": Plan(groups=3, stages=6, values=DIRECT, sets=1, copiers=0),
    "narrow three, direct": Plan(groups=3, columns=192, stages=7, values=DIRECT),
    "narrow four, direct": Plan(groups=4, columns=128, stages=10, values=DIRECT, band=4),
    "held": Plan(stages=6, values=HELD),
    "held, still": Plan(stages=6, values=HELD, still=1),
}
USUAL = PLANS["direct"]  # of `Operand`: by the rates that the kernel's header expects


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
    groups 8s + 4u + 0..3 of row 16w + g, and above them those of row 16w + g + 8.
    """
    N, groups = codes.shape
    places = torch.empty(N // 64, groups // 16, 128, dtype=torch.int32, device=codes.device)
    shifts = torch.arange(0, 32, 4, device=codes.device).view(2, 1, 1, 1, 1, 4)  # half, of four
    step = max(1, (1 << 20) // groups)  # tiles at once: the words are wide on the way
    for at in range(0, N // 64, step):
        some = codes[at * 64 : (at + step) * 64]
        code = some.view(-1, 4, 2, 8, groups // 16, 2, 2, 4).long()  # t, w, half, g, b, s, u, j
        words = (code << shifts).sum((2, 7)).permute(0, 3, 1, 2, 4, 5)  # t, b, w, g, s, u
        words = words.reshape(-1, groups // 16, 128)
        places[at : at + step] = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return places


def arrange_reference(values: Tensor) -> Tensor:
    """values [N, K/2] -> arranged [N/64, K/32, 128, 8], in plain PyTorch.

    Thread 32w + 4g + q of step k holds, as its four registers of two values, the kept pairs of
    group 8k + q of rows 16w + g and 16w + g + 8, then those of group 8k + 4 + q.
    """
    N, half = values.shape
    split = values.view(N // 64, 4, 2, 8, half // 16, 2, 4, 2)  # t, w, row half, g, k, u, q, e
    return split.permute(0, 4, 1, 3, 6, 5, 2, 7).reshape(N // 64, half // 16, 128, 8)


def arrange(values: Tensor, out: Tensor | None = None) -> Tensor:
    """`arrange_reference` on a GPU, in one pass; values and out contiguous."""
    N, half = values.shape
    arranged = values.new_empty(N // 64, half // 16, 128, 8) if out is None else out
    kernel = _kernels(values.dtype, False, USUAL)[0]
    kernel((half // 32, N // 64, 1), (256, 1, 1), [values, arranged, half * 2])
    return arranged


def product(
    x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None = None, plan: Plan = USUAL
) -> Tensor:
    """X Wᵀ + b: x [B, K], places of `arrange_places`, bias [N] -> [B, N], contiguous.

    values [N, K/2]; for a plan that `arranges`, `arrange(values)`. The sums are
    float32, in the order of K.
    """
    (batch, K), N = x.shape, places.shape[0] * 64
    if batch == 0:
        return x.new_empty(0, N)
    shape = (N // 64, K // 32, 128, 8) if plan.arranges else (N, K // 2)
    if values.shape != shape or not values.is_contiguous():
        raise ValueError(
            f"values of shape {tuple(values.shape)}: x and places of this size and {plan} need "
            f"contiguous {shape}; pass the kept values, or `arrange` of them"
        )
    if not tensor_maps.aligned(x):
        x = x.clone(memory_format=torch.contiguous_format)
    y = x.new_empty(batch, N)
    # A plan that does not copy values into shared memory reads no map of them.
    w = values.view(N, K // 2)
    maps = [
        tensor_maps.tensor_map(x, (plan.columns // plan.cluster, 64), 128),
        tensor_maps.tensor_map(w, (plan.groups * 64, 32), 64),
        tensor_maps.tensor_map(places, (plan.groups, 1, 128)),
        tensor_maps.tensor_map(y, (32, 64), 128),
    ]
    multiply = _kernels(x.dtype, bias is not None, plan)[1]
    rows, columns = -(-N // (plan.cluster * plan.groups * 64)), -(-batch // plan.columns)
    blocks = min(rows * columns, _clusters(x.dtype, bias is not None, plan)) * plan.cluster
    sizes = [N // 64, K // 64, rows, columns]
    arguments = [*maps, values, values if bias is None else bias, *sizes]
    tensor_maps.launch(multiply, blocks, plan.threads, arguments, plan.shared_bytes)
    return y


class Operand:
    """W [N, K] as the kernel reads it; values [N, K/2], which others write, and codes [N, K/4].

    The arranged values are made anew, in the same memory, by the first product after a write that
    PyTorch counts or after `mark_stale`: once for all chunks of a batch. A graph that captures that
    product makes them anew at each replay.
    """

    def __init__(self, values: Tensor, codes: Tensor):
        self.values, self.places = values, arrange_places(codes)
        self._arranged: Tensor | None = None
        self._seen = -1

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + b by the usual plan: x [B, K], bias [N] -> [B, N], contiguous.

        Raises RuntimeError inside a capture where the arranged values have no memory yet.
        """
        return product(x, self._in_order(), self.places, bias, USUAL)

    def mark_stale(self) -> None:
        """Says that the values were written."""
        self._seen = -1

    def renew(self) -> None:
        """Brings arranged values into step now, where a graph may have them."""
        if self._arranged is not None:
            self._in_order()

    @property
    def nbytes(self) -> int:
        """Bytes held beside the values."""
        return self.places.nbytes + (0 if self._arranged is None else self._arranged.nbytes)

    def _in_order(self) -> Tensor:
        if not USUAL.arranges:
            return self.values
        if self._arranged is None:
            graphs.refuse_capture("the wide kernel has no copy of the values")
            self._arranged = arrange(self.values)
        elif self._seen != self.values._version:
            arrange(self.values, self._arranged)
        self._seen = self.values._version
        return self._arranged


@lru_cache
def _clusters(dtype: torch.dtype, bias: bool, plan: Plan) -> int:
    """Clusters that run at once: the kernel stays and takes tile after tile."""
    multiply = _kernels(dtype, bias, plan)[1]
    return tensor_maps.most_clusters(multiply, plan.cluster, plan.threads, plan.shared_bytes)


def macros(dtype: torch.dtype, bias: bool, plan: Plan) -> dict[str, int]:
    """The compile-time constants of `wide24.cu`."""
    copies, multiplies = REGISTERS[plan.groups]
    return {
        "HALF": int(dtype == torch.float16),
        "BIAS": int(bias),
        "GROUPS": plan.groups,
        "COLUMNS": plan.columns,
        "STAGES": plan.stages,
        "CLUSTER": plan.cluster,
        "VALUES": plan.values,
        "SETS": plan.sets,
        "COPIERS": plan.copiers,
        "STILL": plan.still,
        "BAND": plan.band,
        "COPIER": copies,
        "MULTIPLIER": multiplies,
    }


@lru_cache
def _kernels(dtype: torch.dtype, bias: bool, plan: Plan):
    prelude, constants = prelude_of(dtype, plan), macros(dtype, bias, plan)
    shared = {"arrange_values": 0, "product": plan.shared_bytes}
    return [nvrtc.kernel("wide24.cu", name, shared[name], prelude, **constants) for name in shared]


def prelude_of(dtype: torch.dtype, plan: Plan) -> str:
    """What stands before `wide24.cu`: `hopper.cu`, and the wrapper of `wgmma.sp`, whose number of
    operands depends on the rows of X."""
    n, name = plan.columns // 2, DTYPES[dtype]
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
        "wgmma.mma_async.sp.sync.aligned.m64n{plan.columns}k32.f32.{name}.{name} {{{sums}}}, "
        "{{%{n}, %{n + 1}, %{n + 2}, %{n + 3}}}, %{n + 4}, %{n + 5}, %{n + 6}, add, 1, 1, 0;\\n}}"
        : {outputs}
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(codes), "n"(SELECTOR), "r"(add));
}}"""
