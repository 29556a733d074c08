"""Taking the kept columns of a mask that is the same in every group of four, and putting them back.

    take    x [B, K]  -> [B, K/2]     out[b, 2g + s] = x[b, 4g + i_s]
    join    a, b [B, K/2] -> [B, K]   the inverse, for the columns i and the two others
    quads   y [B, N]  -> [4, B, N/4]  out[r, b, g] = y[b, 4g + r]

i = (i0, i1), i0 < i1, are two places of a group. Deterministic copies, bound by memory: with 16-bit
types on CUDA by Triton kernels that move whole groups, else plain PyTorch.
"""

import torch
from torch import Tensor

Places = tuple[int, int]


def others(places: Places) -> Places:
    """The two places of a group that are left."""
    first, second = (place for place in range(4) if place not in places)
    return first, second


def take_reference(x: Tensor, places: Places) -> Tensor:
    """Plain-PyTorch `take`."""
    groups = x.unflatten(1, (-1, 4))
    return torch.stack([groups[:, :, place] for place in places], dim=2).flatten(1)


def join_reference(a: Tensor, b: Tensor, places: Places, out: Tensor) -> None:
    """Plain-PyTorch `join`."""
    groups = out.unflatten(1, (-1, 4))
    for part, kept in ((a, places), (b, others(places))):
        for s, place in enumerate(kept):
            groups[:, :, place] = part[:, s::2]


def quads_reference(y: Tensor) -> Tensor:
    """Plain-PyTorch `quads`."""
    return y.unflatten(1, (-1, 4)).permute(2, 0, 1).contiguous()


def take(x: Tensor, places: Places) -> Tensor:
    """The columns at two places of every group: x [B, K], any strides -> [B, K/2], contiguous."""
    if not _fast(x):
        return take_reference(x, places)
    from blockshock.kernels import columns_triton

    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    columns_triton.take(x, places, out)
    return out


def join(a: Tensor, b: Tensor, places: Places, out: Tensor) -> None:
    """Writes a's columns at `places` and b's at the others: a, b [B, K/2] into out [B, K].

    out may be some columns of a wider tensor.
    """
    if not (_fast(out) and a.is_contiguous() and b.is_contiguous()):
        join_reference(a, b, places, out)
        return
    from blockshock.kernels import columns_triton

    columns_triton.join(a, b, places, out)


def quads(y: Tensor) -> Tensor:
    """Columns r, r + 4, … of y [B, N] for each r of four -> [4, B, N/4]."""
    if not _fast(y):
        return quads_reference(y)
    from blockshock.kernels import columns_triton

    out = y.new_empty(4, y.shape[0], y.shape[1] // 4)
    columns_triton.quads(y, out)
    return out


def _fast(wide: Tensor) -> bool:
    return (
        wide.device.type == "cuda"
        and wide.element_size() == 2
        and wide.stride(1) == 1
        and wide.stride(0) % 4 == 0
        and wide.data_ptr() % 8 == 0
        and wide.shape[1] % 4 == 0
        and wide.numel() > 0
    )
