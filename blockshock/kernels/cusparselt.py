"""cuSPARSELt's 2:4 product and its metadata, as PyTorch's private operators give them.

The compressed matrix is one [N, 9K/16] buffer: its first N·K/2 elements are the kept values in
row-major order, what follows is metadata that depends on the mask alone and is laid out block of
64 rows by block. So metadata is made once, from the mask, in row blocks, and values are written in
place afterwards. (Seen with cuSPARSELt 0.8 for bf16 and fp16; `tests/test_sparse24.py` proves it.)

The product is `torch._cslt_sparse_mm` with `transpose_result`, so X and Y stay row-major and no
copy is made around it.
"""

import torch
from torch import Tensor

from blockshock import masks

DTYPES = (torch.bfloat16, torch.float16)
ROWS_MULTIPLE = 64  # both sizes of the sparse matrix, for cuSPARSELt and for the row blocks
BLOCK = 256  # rows of a mask that are decoded at once, so that no whole one is ever held
BATCH_MULTIPLE = 8  # rows of X: a descriptor's leading dimension must be 16 bytes


def unsupported(dtype: torch.dtype, device_type: str) -> str | None:
    """Why the 2:4 product cannot run on this dtype and device, or None when it can."""
    if device_type != "cuda":
        return None
    if dtype not in DTYPES:
        return (
            f"the 2:4 kernels take bf16 or fp16 on a GPU, got {_name(dtype)}; "
            "use dtype bf16 or fp16, or a dense method"
        )
    if not torch.backends.cusparselt.is_available():
        return (
            "the 2:4 kernels need cuSPARSELt, and this build of PyTorch finds none; "
            "install a CUDA build of PyTorch that carries it"
        )
    return None


def write_metadata(compressed: Tensor, mask: Tensor, start: int) -> None:
    """Writes the metadata of `mask`, rows start.. of the matrix, into the compressed buffer.

    compressed [N, 9K/16] bf16 or fp16 on CUDA; mask [n, K] bool, start and n multiples of 64.
    """
    n, columns = mask.shape
    rows = compressed.shape[0]
    block = torch._cslt_compress(mask.to(compressed.dtype)).view(-1)
    first = rows * columns // 2 + start * columns // 16
    compressed.view(-1)[first : first + n * columns // 16] = block[n * columns // 2 :]


def write_all_metadata(compressed: Tensor, codes: Tensor) -> None:
    """The metadata of a whole mask, decoded in blocks of rows; codes [N, K/4] (`masks.encode`).

    (`_cslt_compress` of the whole matrix was wrong at N = K = 81920, cuSPARSELt 0.8.)
    """
    for start in range(0, len(codes), BLOCK):
        write_metadata(compressed, masks.decode(codes[start : start + BLOCK]), start)


def run(x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    """One product with a given algorithm; x [B, K] contiguous, B a multiple of 8."""
    # Of a [K, 1] operand both layouts are contiguous; BATCH_MULTIPLE keeps that case away.
    return torch._cslt_sparse_mm(
        compressed, x.t(), bias=bias, transpose_result=True, alg_id=algorithm
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
