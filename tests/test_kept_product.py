"""The product that keeps a mask's entries in its epilogue is the whole product, gathered.

The Triton kernel runs on a GPU, or under Triton's interpreter (see conftest.py), which multiplies
the bits of bf16 as if they were integers: it is given fp16.
"""

import pytest
import torch

from blockshock import masks
from blockshock.kernels import kept_product, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = kept_product.DTYPES if DEVICE == "cuda" else (torch.float16,)
# (N, K, B): less than a tile of everything, ends within tiles, one row, a last band of fewer tiles,
# and on a GPU more tiles than processors.
SHAPES = [(64, 64, 8), (192, 320, 70), (448, 576, 1), (128, 256, 64), (1088, 576, 8)]
SHAPES += [(3264, 3136, 24)] if DEVICE == "cuda" else []


@pytest.fixture(scope="module")
def kernel():
    pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
    from blockshock.kernels import kept_product_triton

    return kept_product_triton.kept_product


def problem(N, K, B, dtype, seed=0):
    """Small integers, whose products and sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    dy, x = (torch.randint(-2, 3, (B, n), generator=generator).float() for n in (N, K))
    mask = masks.make("random", torch.zeros(N, K), start=0, seed=seed)
    codes = masks.encode(mask)
    return dy.to(DEVICE, dtype), x.to(DEVICE, dtype), codes.to(DEVICE), mask.to(DEVICE)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("N", "K", "B"), SHAPES)
def test_the_kernel_keeps_exactly_what_the_mask_keeps(kernel, N, K, B, dtype):
    dy, x, codes, mask = problem(N, K, B, dtype)
    poison = torch.full((N, K // 2), torch.nan, dtype=dtype, device=DEVICE)
    del poison
    truth = (dy.double().t() @ x.double())[mask].view(N, K // 2)
    assert torch.equal(kernel(dy, x, codes).double(), truth.to(dtype).double())
    assert torch.equal(kept_product.kept_product_reference(dy, x, codes).double(), truth)


def test_the_kernel_reads_slices_transposed_and_misaligned_operands(kernel):
    N, K, B = 128, 192, 40
    dy, x, codes, _ = problem(N, K, B, HALVES[0])
    expected = kept_product.kept_product_reference(dy, x, codes)
    for before in (8, 1):  # rows that start at 16 bytes, and not
        wide = x.new_full((B, before + K + 8), torch.nan)
        part = wide[:, before : before + K]
        part.copy_(x)
        assert torch.equal(kernel(dy.t().contiguous().t(), part, codes), expected)
    one = dy[:1].expand(B, N)
    assert torch.equal(kernel(one, x, codes), kept_product.kept_product_reference(one, x, codes))


def test_a_wrong_code_is_seen(kernel):
    dy, x, codes, _ = problem(64, 64, 8, HALVES[0])
    expected = kept_product.kept_product_reference(dy, x, codes)
    codes[5, 3] = masks.complement(codes[5:6, 3:4])[0, 0]
    differs = kernel(dy, x, codes) != expected
    assert differs.any()
    assert differs.nonzero()[:, 0].unique().tolist() == [5]


def test_what_is_not_fused_is_gathered():
    cpu = torch.device("cpu")
    assert not kept_product.fused(64, torch.bfloat16, cpu)
    dy, x, codes, _ = problem(64, 64, 8, torch.float32)
    found = kept_product.kept_product(dy, x, codes)
    assert torch.equal(found, pack.gather_kept(dy.t() @ x, codes))
