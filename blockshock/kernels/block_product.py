"""Products with a block-sparse W [N, K] of kept tiles [b, b], and its gradient at these tiles.

    Y[:, n] = act( Σ_k X[:, k] w(n, k)ᵀ + b_n )    over the kept tiles (n, k) of a row of tiles
    dX[:, k] = Σ_n dZ[:, n] w(n, k)                over those of a column
    dw(n, k) = dZ[:, n]ᵀ X[:, k]                   for each kept tile

values [kept, b, b] are the tiles in the order of `block_lists`; what sticks out of W is zero there.
The plain-PyTorch version of each is beside it: it expands W, and multiplies densely.
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from blockshock.kernels.block_lists import Lists
from blockshock.kernels.block_plans import GRADIENTS, Plan, halves, pieces, products

DTYPES = (torch.bfloat16, torch.float16)
IN_L2 = 1 << 24  # bytes of X that programs share at a time, of an L2 of 50 MB
ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu}


def unsupported(dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Why the Triton kernels cannot run, or None."""
    device = torch.device(device)
    if dtype not in DTYPES:
        return (
            f"the block-sparse kernels take bf16 or fp16, got {str(dtype).removeprefix('torch.')}; "
            "convert with .to(), use autocast, or kernel 'torch'"
        )
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major not in (9, 10):
            return (
                "the block-sparse kernels need a GPU of compute capability 9 or 10, with 228 KB of "
                f"shared memory a processor, this is {major}.{minor}; use kernel 'torch'"
            )
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "the block-sparse kernels need a GPU, and the tensors are on the CPU; use kernel "
            "'torch', or set TRITON_INTERPRET=1 before Triton is imported, for tests"
        )
    if dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bf16 as integers; use fp16"
    return None


def expand(values: Tensor, lists: Lists, shape: tuple[int, int]) -> Tensor:
    """The dense W [N, K], zeros where no tile is kept. Differentiable."""
    (R, C), b = lists.grid, values.shape[-1]
    tiles = values.new_zeros(R, C, b, b)
    tiles = tiles.index_put((lists.lines.long(), lists.rows.others.long()), values)
    return tiles.transpose(1, 2).reshape(R * b, C * b)[: shape[0], : shape[1]]


def gather(dense: Tensor, lists: Lists, block: int) -> Tensor:
    """The kept tiles [kept, b, b] of a dense W [N, K], zeros where they stick out of it."""
    (R, C), (N, K) = lists.grid, dense.shape
    dense = F.pad(dense, (0, C * block - K, 0, R * block - N))
    tiles = dense.view(R, block, C, block).transpose(1, 2)
    return tiles[lists.lines.long(), lists.rows.others.long()]


def product_reference(
    x: Tensor,
    values: Tensor,
    lists: Lists,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Y in plain PyTorch, with all gradients by autograd. x [..., K] -> [..., N]."""
    return ACTIVATIONS[activation](F.linear(x, expand(values, lists, shape), bias))


def product(
    x: Tensor,
    values: Tensor,
    lists: Lists,
    width: int,
    *,
    transposed: bool = False,
    bias: Tensor | None = None,
    activation: str | None = None,
    keep: bool = False,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(Y, Z): x [B, K] -> [B, width] of its dtype; transposed: X W, of x [B, N], in place of X Wᵀ.

    keep: whether Z, without the activation, is returned as well, else None. plan: None is the rule.
    """
    from blockshock.kernels import block_product_triton  # no Triton beside PyTorch's CPU build

    B, block = len(x), values.shape[-1]
    y = _aligned(B, width, x)
    z = _aligned(B, width, x) if keep else y
    side = lists.columns if transposed else lists.rows
    if B:
        plan = plan or products(block, B)[0]
        lines, parts = len(side.turns), -(-B // plan.rows)
        programs = lines * parts
        if plan.each:
            programs = min(programs, plan.each * _processors(x.device))
        items, written = -(-lines * parts // programs), halves(plan, block)
        values = _readable(values.reshape(-1, block))
        with torch.cuda.device_of(x):
            block_product_triton.product[(programs,)](
                _tiled(_readable(x), plan.rows, plan.step),
                _tiled(values, *((plan.step, block) if transposed else (block, plan.step))),
                _tiled(y, plan.rows // written, block),
                _tiled(z, plan.rows // written, block),
                y if bias is None else bias.contiguous(),
                side.others,
                lists.numbers,
                side.turns,
                lines,
                parts,
                max(1, IN_L2 // (plan.rows * x.shape[1] * x.element_size())),
                programs,
                len((lists.rows if transposed else lists.columns).turns),
                lists.kept,
                width,
                BLOCK=block,
                ROWS=plan.rows,
                STEP=plan.step,
                STAGES=plan.stages,
                ITEMS=1 << (items - 1).bit_length(),
                PIECES=written,
                TRANSPOSED=transposed,
                ACTIVATION=activation,
                BIAS=bias is not None,
                KEEP=keep,
                num_warps=plan.warps,
            )
    return y.contiguous(), z.contiguous() if keep else None


def gradient(
    dz: Tensor, x: Tensor, lists: Lists, block: int, *, plan: Plan | None = None
) -> Tensor:
    """dw [kept, b, b] of dz [B, N], x [B, K]: their dtype, sums in float32."""
    from blockshock.kernels import block_product_triton

    B = len(x)
    made = x.new_empty(lists.kept, block, block)
    if not B:
        return made.zero_()
    plan = plan or GRADIENTS[block][0]
    programs = lists.kept * (block // plan.rows)
    count = pieces(programs, B, plan)
    piece = -(-B // (count * plan.step)) * plan.step
    count = -(-B // piece)
    out = made if count == 1 else made.new_empty(count, *made.shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        block_product_triton.gradient[(count * programs,)](
            _tiled(_readable(dz), plan.step, plan.rows),
            _tiled(_readable(x), plan.step, block),
            _tiled(out.view(-1, block), plan.rows, block),
            lists.lines,
            lists.rows.others,
            lists.kept,
            B,
            piece,
            BLOCK=block,
            HEIGHT=plan.rows,
            DEPTH=plan.step,
            STAGES=plan.stages,
            num_warps=plan.warps,
        )
    return made if count == 1 else torch.sum(out, 0, dtype=torch.float32).to(made.dtype)


def _aligned(rows: int, columns: int, like: Tensor) -> Tensor:
    """Room for [rows, columns] whose rows begin at 16 bytes, as the memory accelerator needs."""
    entries = 16 // like.element_size()
    room = like.new_empty(rows, -(-columns // entries) * entries)
    return room if room.shape[1] == columns else room[:, :columns]


def _readable(x: Tensor) -> Tensor:
    """Itself where the memory accelerator can read it: unit stride, rows that begin at 16 bytes."""
    size = x.element_size()
    pitch = x.stride(0) * size
    if x.stride(1) == 1 and pitch % 16 == 0 and pitch > 0 and x.data_ptr() % 16 == 0:
        return x
    return _aligned(*x.shape, x).copy_(x)


def _tiled(x: Tensor, rows: int, columns: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, columns])


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # under Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
