"""Which kernel multiplies by a 2:4 matrix.

    cusparselt  the library's 2:4 product, by the fastest of its correct algorithms (`sparse24`)
    thin        for few rows of X, bound by reading W (`thin24`)
    wide        for many rows of X on Hopper (`wide24`)
    folded      for a mask that keeps whole columns: the dense product of those columns of X
    plain       on the CPU: the matrix is expanded, then multiplied densely

Under "auto" `candidates` says which of them can be had; who chooses measures (`tuning`). Where
nothing can be measured the rule is: folded where it can, thin up to 64 rows, else cusparselt. So
`wide` is taken where it was measured as the fastest, and nowhere else.
"""

import torch

from blockshock.kernels import algorithms, cusparselt, kept_product, thin24, wide24

KERNELS = ("auto", "cusparselt", "thin", "wide", "folded")
RULE_ROWS = 64  # up to so many rows `thin` is the rule, and `wide` no candidate
THIN_ROWS = 512  # beyond it the thin kernel reads the weight too often to be a candidate


def kind(period: tuple[int, int, int, int] | None) -> str:
    """What the choice needs to know of a mask: "columns" (whole ones), "periodic" or "free"."""
    if period is None:
        return "free"
    return "columns" if len(set(period)) == 1 else "periodic"


def unsupported(kernel: str, dtype: torch.dtype, device_type: str) -> str | None:
    """Why a kernel cannot be asked for, or None. Whether a mask can be folded is not known here."""
    if kernel not in KERNELS:
        return f"unknown kernel {kernel!r}; use one of {', '.join(KERNELS)}"
    if kernel == "thin":
        return thin24.unsupported(dtype, device_type)
    if kernel == "wide":
        return wide24.unsupported(dtype, device_type)
    if kernel == "cusparselt" and device_type != "cuda":
        return "kernel 'cusparselt' runs on NVIDIA GPUs, and the layer is on the CPU; use 'auto'"
    return cusparselt.unsupported(dtype, device_type)


def candidates(kernel: str, mask: str, rows: int, dtype, device) -> tuple[str, ...]:
    """What can multiply rows of x where `kernel` is asked for, under a mask of this kind; the first
    by rule.
    """
    if device.type != "cuda":
        return ("folded" if mask == "columns" and kernel in ("auto", "folded") else "plain",)
    if kernel != "auto":
        return (kernel,)
    found = ["folded"] if mask == "columns" else []
    few = rows <= RULE_ROWS
    if rows <= THIN_ROWS and thin24.unsupported(dtype, device.type) is None:
        found += ["thin", "cusparselt"] if few else ["cusparselt", "thin"]
    else:
        found += ["cusparselt"]
    if not few and wide24.unsupported(dtype, device.type) is None:
        found += ["wide"]
    return tuple(found)


def describe(kernel: str, packed, rows: tuple[int, ...]) -> str:
    """What runs, in words. packed: a `Packed24`; rows: sizes of x, of which one has run."""
    N, K = packed.shape
    if kernel == "cusparselt":
        known = (algorithms.known(size, N, K, packed.values.dtype) for size in rows)
        return f"cuSPARSELt, algorithm {next((n for n in known if n is not None), 'unknown')}"
    return {
        "plain": "dense product with the expanded term: plain PyTorch on the CPU",
        "folded": "dense product of the kept columns",
        "thin": "thin 2:4 kernel",
        "wide": "wide 2:4 kernel",
    }[kernel]


def describe_gradient(mask: str, rows: int, like: torch.Tensor) -> str:
    """What computes the weight's gradient under a mask of this kind; like: its dtype and device."""
    if mask == "free" and kept_product.fused(rows, like.dtype, like.device):
        return "product that keeps the mask's entries as it ends"
    return {
        "columns": "dense product of the kept columns",
        "periodic": "dense products of the kept columns of each row of four",
        "free": "dense product, then the kept entries",
    }[mask]
