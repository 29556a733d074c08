"""Launches of the attention kernels: `flash_forward` and `flash_backward`.

Dense, causal, or over the lists of a block table (`attention.blocks`), which then says how large
tiles are. The plain-PyTorch version beside it is `attention.flash_torch`. Operands are read by the
tensor memory accelerator (in interpreter mode by Triton's imitation of it).
"""

import os

import torch
from torch import Tensor

from blockshock.kernels.dropout import Dropout
from blockshock.kernels.flash_plans import MOST, Plan, chosen, padded, split

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NONE = Dropout()
LOG2E = 1.4426950408889634
MAX_D = 256


def unsupported(dtype: torch.dtype, device_type: str) -> str | None:
    """Why the kernels cannot run, or None."""
    if dtype not in DTYPES:
        return f"the attention kernels take fp16, bf16 or fp32, got {dtype}; convert with .to()"
    if device_type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "the attention kernels need a GPU, and the tensors are on the CPU; use flash_torch, or "
            "set TRITON_INTERPRET=1 before Triton is imported, for tests"
        )
    if dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bf16 as integers; use fp16 or fp32"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    shift: int | None = None,
    table=None,
    dropout: Dropout = NONE,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of q [B, H, Tq, D], k, v [B, H / group, Tk, D]: like q, and float32 [B, H, Tq].

    scale must be positive. shift: query i sees keys j <= i + shift; None: all. table: a
    `blocks.BlockTable` of the tiles to compute; causal is then in the table. lse is natural, −inf
    for a row that attends to nothing, whose out is zero.
    """
    from blockshock.kernels import flash_forward  # no Triton beside PyTorch's CPU build

    B, H, Tq, D = q.shape
    rows = H // max(k.shape[1], 1) * Tq
    if table is None and shift is None and Tq < rows <= 64:  # heads that share keys share a tile
        out, lse = forward(q.reshape(B, -1, rows, D), k, v, scale=scale)
        return out.view(q.shape), lse.view(B, H, Tq)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
    k, v = _seen(k, Tq, shift), _seen(v, Tq, shift)
    if not out.numel() or not k.numel():
        return out.zero_(), lse.fill_(-torch.inf)
    plan, pieces = chosen(q.shape, q.dtype, listed=True).forward, 1
    if table is None:
        plan, pieces = split(q.shape, q.dtype, k.shape[2])
    _check_tile(table, plan)
    count, slots = _programs(table, -(-Tq // plan.M), pieces=pieces)
    q, k, v = (_readable(x) for x in (q, k, v))
    parts = levels = lse  # not used without slots
    if slots:
        parts = lse.new_empty(B * H * slots, plan.M, padded(q.shape[3]))
        levels = lse.new_empty(B * H * slots, plan.M)
    with torch.cuda.device_of(q):
        flash_forward.forward[(B * H * count * pieces,)](
            *(_tiled(x, n) for x, n in ((q, plan.M), (k, plan.N), (v, plan.N), (out, plan.M))),
            lse,
            parts,
            levels,
            *_lists(table, lse),
            H,
            count,
            pieces,
            slots,
            Tq,
            k.shape[2],
            shift or 0,
            scale * LOG2E,
            dropout.seed,
            dropout.threshold,
            dropout.factor,
            **_constants(q, k, plan, shift, table, dropout),
        )
        if pieces > 1:
            from blockshock.kernels import flash_split

            flash_split.merge_pieces[(B * H * Tq,)](
                *(parts, levels, out, lse, pieces, count, Tq),
                M=plan.M,
                WIDTH=D,
                D=parts.shape[-1],
                MOST=MOST,
                STEP=16,
                num_warps=2,
            )
        elif slots:
            from blockshock.kernels import flash_split

            splits = table.splits
            flash_split.merge[(B * H * len(splits),)](
                *(parts, levels, splits, _tiled(out, plan.M), lse, len(splits), slots, H, Tq),
                ROWS=plan.M,
                D=parts.shape[-1],
            )
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    *,
    scale: float,
    shift: int | None = None,
    table=None,
    dropout: Dropout = NONE,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dQ, dK, dV, shaped like q, k, v, from `forward`'s results and the gradient of out.

    wanted: whether dQ, and whether dK and dV; None in place of those that are not.
    """
    Tq, whole = q.shape[2], k
    k, v = _seen(k, Tq, shift), _seen(v, Tq, shift)
    empty = not q.numel() or not k.numel()
    fresh = torch.zeros_like if empty or k is not whole else torch.empty_like
    shaped = torch.contiguous_format
    dq = fresh(q, memory_format=shaped) if wanted[0] else None
    dk, dv = (fresh(whole, memory_format=shaped) if wanted[1] else None for _ in "kv")
    if empty:
        return dq, dk, dv
    q, k, v, out, d_out = (_readable(x) for x in (q, k, v, out, d_out))
    options = {"scale": scale, "shift": shift, "table": table, "dropout": dropout}
    with torch.cuda.device_of(q):
        level, delta = _prepared(out, lse, d_out)
        if wanted[1]:
            seen = _seen(dk, Tq, shift), _seen(dv, Tq, shift)
            _gradients(seen, q, k, v, d_out, level, delta, **options)
        if wanted[0]:
            _gradients((dq,), q, k, v, d_out, level, delta, **options)
    return dq, dk, dv


def _prepared(out: Tensor, lse: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """lse in base 2, and rowsum(out ∘ d_out): float32 [B H, Tq and more], rows at 16 bytes."""
    from blockshock.kernels import flash_backward

    (B, H, Tq, D), rows = out.shape, 64
    pitch = -(-Tq // 4) * 4
    level, delta = lse.new_empty(B * H, pitch), lse.new_empty(B * H, pitch)
    tiles = -(-Tq // rows)
    flash_backward.prepare[(B * H * tiles,)](
        *(_tiled(out, rows), _tiled(d_out, rows), lse, level, delta, tiles, H, Tq, pitch),
        M=rows,
        D=padded(D),
    )
    return level, delta


def _gradients(made, q, k, v, d_out, level, delta, *, scale, shift, table, dropout) -> None:
    """Fills made: (dK, dV), or (dQ,)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from blockshock.kernels import flash_backward

    own, of_keys = chosen(q.shape, q.dtype, listed=table is not None), len(made) == 2
    plan, side = (own.keys, k) if of_keys else (own.queries, q)
    kernel = flash_backward.gradients_of_keys if of_keys else flash_backward.gradients_of_queries
    rows = plan.N if of_keys else plan.M
    _check_tile(table, plan)
    count, slots = _programs(table, -(-side.shape[2] // rows), transposed=of_keys)
    heads = side.shape[0] * side.shape[1]
    size = heads * slots, rows, padded(q.shape[3])
    parts = [level.new_empty(size) if slots else level for _ in made]
    kernel[(heads * count,)](
        *(_tiled(x, n) for x, n in ((q, plan.M), (k, plan.N), (v, plan.N), (d_out, plan.M))),
        *(_tiled(x, rows) for x in made),
        *(TensorDescriptor.from_tensor(x, [1, plan.M]) for x in (level, delta)),
        *parts,
        *_lists(table, level, plan.M if of_keys else None),
        q.shape[1],
        count,
        slots,
        q.shape[2],
        k.shape[2],
        shift or 0,
        scale * LOG2E,
        scale,
        dropout.seed,
        dropout.threshold,
        dropout.factor,
        **_constants(q, k, plan, shift, table, dropout),
    )
    if slots:
        from blockshock.kernels import flash_split

        splits = table.splits_t if of_keys else table.splits
        for part, x, factor in zip(parts, made, (scale, 1.0), strict=False):
            flash_split.add[(heads * len(splits),)](
                *(part, splits, _tiled(x, rows), len(splits), slots, side.shape[1], factor),
                ROWS=rows,
                D=part.shape[-1],
            )


def _seen(x: Tensor, Tq: int, shift: int | None) -> Tensor:
    """Of keys, or what is shaped like them, those that any query sees: others are not read."""
    if shift is None or Tq + shift >= x.shape[2]:
        return x
    return x[:, :, : max(Tq + shift, 0)]


def _programs(table, tiles: int, *, transposed=False, pieces: int = 1) -> tuple[int, int]:
    """Tiles or turns of a head, and slots of a head for the pieces of these."""
    if table is None:
        return tiles, tiles * pieces if pieces > 1 else 0
    turns, slots = (table.turns_t, table.slots_t) if transposed else (table.turns, table.slots)
    return turns.shape[1], slots


def _check_tile(table, plan: Plan) -> None:
    if table is not None and (table.block_q, table.block_k) != (plan.M, plan.N):
        raise ValueError(
            f"a table of {table.block_q} x {table.block_k} tiles: the kernels work in tiles of "
            f"{plan.M} x {plan.N} for these sizes; make it by block_sparse.table"
        )


def _lists(table, anything: Tensor, rows: int | None = None) -> tuple:
    """The lists as the kernels take them; what is not read may be any tensor.

    rows: of keys, and then the intervals of their queries are read in tiles of so many.
    """
    if table is None:
        return (*(anything,) * 6, 0, 0)
    names = ("turns", "keys", "masks")
    if rows:
        names = ("turns_t", "queries_t", "masks_t")
    lists = tuple(getattr(table, name) for name in names)
    ends = (anything, anything) if table.low is None else (table.low, table.high)
    if rows and table.low is not None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        ends = tuple(TensorDescriptor.from_tensor(x, [rows]) for x in ends)
    return (*lists, *ends, table.bits, table.batch_stride, table.head_stride)


def _constants(q: Tensor, k: Tensor, plan: Plan, shift, table, dropout: Dropout) -> dict:
    keep = "ragged" if shift is None else "causal"
    if table is not None:
        keep = "bits" if table.low is None else "interval"
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "M": plan.M,
        "N": plan.N,
        "D": padded(q.shape[3]),
        "PRECISION": "ieee",
        "LISTED": table is not None,
        "CONSECUTIVE": table is not None and table.consecutive,
        "KEEP": keep,
        "DROP": dropout.rate > 0,
        "STAGES": plan.stages,
        "OWN_IN_REGISTERS": plan.in_registers,
        "num_warps": plan.warps,
    }


def _readable(x: Tensor) -> Tensor:
    """Itself where the memory accelerator can read it: unit stride, all else at 16 bytes."""
    size = x.element_size()
    fits = x.stride(3) == 1 and all(stride * size % 16 == 0 and stride for stride in x.stride()[:3])
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _tiled(x: Tensor, rows: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [1, 1, rows, padded(x.shape[3])])
