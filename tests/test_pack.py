"""The Triton kernels that move kept values agree with plain PyTorch to the bit.

Without a GPU they run under Triton's interpreter (see conftest.py); shapes are no multiples of the
kernels' blocks, and every output is poisoned first.
"""

import pytest
import torch

from blockshock import masks
from blockshock.kernels import pack

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
from blockshock.kernels import pack_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(4, 4), (64, 64), (68, 132), (12, 1036), (200, 260)]


def weight_and_codes(shape, pattern, dtype):
    generator = torch.Generator(DEVICE).manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    weight[0, :2] = 0  # an exact zero is data
    return weight, masks.encode(masks.make(pattern, weight))


def poisoned(rows, columns, dtype):
    return torch.full((rows, columns), torch.nan, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        ("1001", torch.float32),
        ("random", torch.bfloat16),
        ("magnitude", torch.float16),
        ("tile_magnitude", torch.float32),
    ],
)
def test_gather_and_expand_match_the_reference(shape, pattern, dtype):
    weight, codes = weight_and_codes(shape, pattern, dtype)
    values = poisoned(shape[0], shape[1] // 2, dtype)
    pack_triton.gather_kept(weight, codes, values)
    assert torch.equal(values, pack.gather_kept_reference(weight, codes))
    dense = poisoned(*shape, dtype)
    pack_triton.expand(values, codes, dense)
    assert torch.equal(dense, pack.expand_reference(values, codes))
    assert torch.equal(dense, weight * masks.decode(codes))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", ["tile", "tile_magnitude"])
def test_transposed_values_match_the_reference(shape, pattern):
    weight, codes = weight_and_codes(shape, pattern, torch.float32)
    values, codes_t = pack.gather_kept_reference(weight, codes), masks.transpose(codes)
    out = poisoned(shape[1], shape[0] // 2, torch.float32)
    pack_triton.transpose_kept(values, codes, out)
    assert torch.equal(out, pack.transpose_kept_reference(values, codes, codes_t))


def test_public_functions_write_into_out():
    weight, codes = weight_and_codes((64, 128), "tile", torch.float32)
    out = poisoned(64, 64, torch.float32)
    assert pack.gather_kept(weight, codes, out=out) is out
    assert torch.equal(out, pack.gather_kept_reference(weight, codes))
    again = poisoned(64, 128, torch.float32)
    assert pack.expand(out, codes, out=again) is again
    assert torch.equal(again, pack.expand_reference(out, codes))
