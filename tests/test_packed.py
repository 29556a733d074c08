"""The packed form holds just the kept entries, in step with its transpose, in the bytes it says."""

import pytest
import torch

from blockshock import masks
from blockshock.packed import Packed24, estimated_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed(pattern="tile", N=128, K=192, dtype=torch.bfloat16):
    weight = torch.randn(N, K, device=DEVICE).to(dtype)
    mask = masks.make(pattern, weight)
    return weight, mask, Packed24.pack(weight, mask)


@pytest.mark.parametrize("pattern", masks.PATTERNS)
def test_a_term_and_its_complement_add_up_to_the_weight(pattern):
    weight, mask, first = packed(pattern)
    second = Packed24.pack(weight, ~mask)
    assert torch.equal(first.unpack(), weight * mask)
    assert torch.equal(first.unpack() + second.unpack(), weight)


def test_row_blocks_give_the_form_that_the_whole_gives():
    weight, mask, whole = packed("random")
    blocks = Packed24.empty(128, 192, dtype=weight.dtype, device=DEVICE)
    for start in (64, 0):
        blocks.write_rows(start, weight[start : start + 64], mask[start : start + 64])
    assert torch.equal(blocks.values, whole.values)
    assert torch.equal(blocks.codes, whole.codes)
    x = torch.randn(24, 192, device=DEVICE).to(weight.dtype)
    assert torch.equal(blocks.product(x), whole.product(x))


def test_values_written_in_place_reach_the_product_and_the_transpose():
    weight, _, form = packed()
    form.with_transpose()
    x, dy = (torch.randn(16, n, device=DEVICE).to(weight.dtype) for n in (192, 128))
    form.values.normal_()
    form.values[0, 0] = 0
    dense = form.unpack()
    assert torch.equal(form.transposed.unpack(), dense.t())
    torch.testing.assert_close(form.product(x), x @ dense.t(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(form.transposed.product(dy), dy @ dense, rtol=2e-2, atol=2e-2)


def test_a_write_that_no_counter_sees_needs_mark_stale():
    _, _, form = packed()
    form.with_transpose()
    form.values.data.fill_(3)
    assert not torch.equal(form.transposed.unpack(), form.unpack().t())
    form.mark_stale()
    assert torch.equal(form.transposed.unpack(), form.unpack().t())


def test_recompress_reads_a_dense_matrix_again():
    weight, mask, form = packed()
    form.with_transpose()
    other = torch.randn_like(weight) * mask
    other[0, :4] = 0  # kept entries that are exactly zero
    form.recompress(other)
    x, dy = (torch.randn(16, n, device=DEVICE).to(weight.dtype) for n in (192, 128))
    torch.testing.assert_close(form.product(x), x @ other.t(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(form.transposed.product(dy), dy @ other, rtol=2e-2, atol=2e-2)


def test_a_mask_that_is_not_transposable_has_no_transpose():
    _, _, form = packed("1100")
    with pytest.raises(ValueError, match="column"):
        form.with_transpose()
    with pytest.raises(ValueError, match="with_transpose"):
        _ = form.transposed


def test_bytes_are_those_of_the_tensors():
    _, _, form = packed(N=128, K=256)
    held = form.values if form.compressed is None else form.compressed
    assert form.nbytes == held.nbytes + 128 * 64
    assert estimated_bytes(128, 256, 2) == 128 * 128 * 2 + 128 * 128 // 4
    single = form.nbytes
    assert form.with_transpose().nbytes == 2 * single


@pytest.mark.parametrize(("N", "K"), [(100, 128), (128, 100), (0, 64)])
def test_sizes_that_are_no_multiple_of_64_are_refused(N, K):
    with pytest.raises(ValueError, match="multiple of 64"):
        Packed24.empty(N, K, dtype=torch.bfloat16, device=DEVICE)


def test_a_mask_that_is_not_2_of_4_is_refused():
    weight = torch.randn(64, 64, device=DEVICE)
    mask = masks.make("tile", weight)
    mask[3, 8:12] = True
    with pytest.raises(ValueError, match="3"):
        Packed24.pack(weight.to(torch.bfloat16), mask)
