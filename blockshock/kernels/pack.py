"""Moving between a dense matrix and the kept values of its 2:4 mask.

A mask is given by its codes, one byte a group of four: i0 | i1 << 2 for the kept places i0 < i1.

    gather_kept       values[n, 2g + s]   = dense[n, 4g + i_s(n, g)]
    expand            dense[n, 4g + i_s]  = values[n, 2g + s], zero elsewhere
    transpose_kept    the values of Wᵀ from those of W, 4×4 tile by 4×4 tile

The functions without a suffix launch a Triton kernel for CUDA tensors and run the reference on
the CPU. All are deterministic copies: no arithmetic, so the answers are equal to the bit.
"""

import torch
from torch import Tensor


def gather_kept_reference(dense: Tensor, codes: Tensor) -> Tensor:
    """Plain-PyTorch `gather_kept`."""
    groups = dense.reshape(*codes.shape, 4)
    places = torch.stack((codes & 3, codes >> 2), dim=-1).long()
    return groups.gather(-1, places).reshape(codes.shape[0], -1)


def expand_reference(values: Tensor, codes: Tensor) -> Tensor:
    """Plain-PyTorch `expand`."""
    pairs = values.reshape(*codes.shape, 2)
    places = torch.stack((codes & 3, codes >> 2), dim=-1).long()
    dense = values.new_zeros(*codes.shape, 4)
    return dense.scatter_(-1, places, pairs).reshape(codes.shape[0], -1)


def transpose_kept_reference(values: Tensor, codes: Tensor, codes_t: Tensor) -> Tensor:
    """Plain-PyTorch `transpose_kept`, through the dense matrix."""
    return gather_kept_reference(expand_reference(values, codes).t().contiguous(), codes_t)


def gather_kept(dense: Tensor, codes: Tensor, out: Tensor | None = None) -> Tensor:
    """The kept entries of `dense`, in row-major order.

    dense [n, k], any float dtype; codes [n, k/4] uint8; out [n, k/2] or None. Returns [n, k/2].
    """
    return _run("gather_kept", gather_kept_reference, (dense, codes), dense.shape[1] // 2, out)


def expand(values: Tensor, codes: Tensor, out: Tensor | None = None) -> Tensor:
    """The dense matrix [n, k] that has `values` [n, k/2] at its kept places and zeros elsewhere."""
    return _run("expand", expand_reference, (values, codes), values.shape[1] * 2, out)


def transpose_kept(
    values: Tensor, codes: Tensor, codes_t: Tensor, out: Tensor | None = None
) -> Tensor:
    """The kept values of Wᵀ, [k, n/2], from those of W, [n, k/2].

    The mask must keep two in every row and every column of each 4×4 tile; `codes_t` [k, n/4] are
    the codes of its transpose. Both come from `blockshock.masks`, which checks them.
    """
    if values.device.type != "cuda":
        result = transpose_kept_reference(values, codes, codes_t)
        return result if out is None else out.copy_(result)
    from blockshock.kernels import pack_triton

    if out is None:
        out = values.new_empty(codes_t.shape[0], codes_t.shape[1] * 2)
    pack_triton.transpose_kept(values, codes, out)
    return out


def _run(name, reference, args, columns: int, out: Tensor | None) -> Tensor:
    if args[0].device.type != "cuda":
        result = reference(*args)
        return result if out is None else out.copy_(result)
    # Imported here: Triton is not installed beside the CPU build of PyTorch.
    from blockshock.kernels import pack_triton

    if out is None:
        out = args[0].new_empty(args[0].shape[0], columns)
    getattr(pack_triton, name)(*(a.contiguous() for a in args), out)
    return out
