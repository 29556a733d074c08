"""The packed form holds just the kept entries, in step with its transpose, in the bytes it says."""

import pytest
import torch

from blockshock import masks
from blockshock.kernels import products
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


# The truth of the tests below is float64 on the CPU; a GPU has bf16, whose sums round once.
FLOATS = [torch.bfloat16] if DEVICE == "cuda" else [torch.float64, torch.float32]


def close(actual, truth):
    # A 16-bit result is rounded once; the float32 sums of a float32 one are rounded as well.
    limit = (1 if actual.dtype.itemsize == 2 else 8) * torch.finfo(actual.dtype).eps
    error = (actual.double() - truth.double()).norm()
    return bool(error <= limit * truth.double().norm())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("term", [0, 1])
@pytest.mark.parametrize("pattern", masks.PATTERNS)
def test_the_kept_gradient_is_the_gathered_dense_product(pattern, term, dtype):
    N, K = 192, 320
    weight = torch.randn(N, K, device=DEVICE).to(dtype)
    mask = masks.make(pattern, weight)
    mask = ~mask if term else mask
    form = Packed24.pack(weight, mask)
    for batch in (0, 1, 37):
        dy, x = (torch.randn(batch, n, device=DEVICE).to(dtype) for n in (N, K))
        truth = (dy.double().t() @ x.double())[mask].view(N, K // 2)
        found = form.kept_gradient(dy, x)
        assert found.shape == (N, K // 2)
        assert found.is_contiguous()
        assert found.dtype == dtype
        assert close(found, truth)
        strided = torch.cat([x.new_full((batch, 4), torch.nan), x, x.new_full((batch, 3), 1)], 1)
        turned = dy.t().contiguous().t()  # what a gradient's strides are is the caller's affair
        assert close(form.kept_gradient(turned, strided[:, 4 : 4 + K]), truth)


def test_a_mask_of_other_columns_in_each_row_is_not_folded():
    for pattern in ("tile", "random"):
        form = packed(pattern)[2]
        with pytest.raises(ValueError, match="cannot be folded"):
            form.product(torch.randn(5, 192, device=DEVICE).bfloat16(), None, "folded")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [("thin", "x is on cpu"), ("wide", "x is on cpu"), ("auto", "unknown kernel 'auto'")],
)
def test_a_kernel_that_cannot_run_is_refused_and_no_other_one_taken(kernel, said):
    weight = torch.randn(64, 64).bfloat16()
    form = Packed24.pack(weight, masks.make("random", weight))
    with pytest.raises(ValueError, match=said):
        form.product(weight, None, kernel)


@pytest.mark.parametrize("kernel", ["thin", "wide"])
def test_operands_that_a_kernel_would_read_wrongly_are_refused(kernel):
    weight = torch.randn(64, 128).bfloat16()
    form, x, bias = Packed24.pack(weight, masks.make("random", weight)), weight[:3], weight[0, :64]
    meta = x.to("meta"), bias
    for bad in ((x[:, :64], bias), (x.half(), bias), (x, weight[0]), (x, bias.float()), meta):
        with pytest.raises(ValueError, match=r"W is \[64, 128\] of torch.bfloat16 on cpu; give"):
            form.product(*bad, kernel)


@pytest.mark.gpus(1)
def test_what_was_recompressed_can_be_rewritten():
    weight, mask, form = packed("tile", N=192, K=320)
    form.with_transpose()
    other = torch.randn_like(weight) * mask * (torch.rand(weight.shape, device=DEVICE) < 0.6)
    form.recompress(other)
    form.rewrite(other)
    x, dy = (torch.randn(40, n, device=DEVICE).bfloat16() for n in (320, 192))
    for kernel in kernels_of("tile"):
        assert close(form.product(x, None, kernel), x.double() @ other.double().t())
        assert close(form.transposed.product(dy, None, kernel), dy.double() @ other.double())


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_check_of_kept_gradients_finds_one_place_that_is_wrong(dtype):
    weight = torch.randn(64, 64, device=DEVICE).to(dtype)
    mask = masks.make("tile", weight)
    dy, x = (torch.randn(64, 64, device=DEVICE).to(dtype) for _ in range(2))
    truth = (dy.double().t() @ x.double())[mask].view(64, 32)
    wrong = mask.clone()
    wrong[4, :4] ^= True
    assert not close(Packed24.pack(weight, wrong).kept_gradient(dy, x), truth)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("term", [0, 1])
@pytest.mark.parametrize("pattern", ["1100", "1010", "1001"])
def test_the_folded_product_takes_all_columns_or_the_kept_ones(pattern, term, dtype):
    weight = torch.randn(192, 320, device=DEVICE).to(dtype)
    mask = masks.make(pattern, weight)
    mask = ~mask if term else mask
    form, bias = Packed24.pack(weight, mask), torch.randn(192, device=DEVICE).to(dtype)
    for batch in (0, 1, 37):
        x = torch.randn(batch, 320, device=DEVICE).to(dtype)
        kept = x[:, masks.kept_columns(pattern, 320, term, device=DEVICE)]
        assert torch.equal(form.kept_input(x), kept)
        assert form.kept_input(kept) is kept
        dy = torch.randn(batch, 192, device=DEVICE).to(dtype)
        assert torch.equal(form.kept_gradient(dy, x), form.kept_gradient(dy, kept))
        for b in (None, bias):
            truth = x.double() @ (weight * mask).double().t() + (0 if b is None else b.double())
            found = form.product(x, b, "folded")
            assert close(found, truth)
            assert torch.equal(found, form.product(kept, b, "folded"))
            assert close(form.product(x, b), truth)  # cuSPARSELt, or expanded on the CPU


def test_the_period_is_found_when_all_rows_are_written():
    weight = torch.randn(128, 64, device=DEVICE).bfloat16()
    form = Packed24.empty(128, 64, dtype=weight.dtype, device=DEVICE)
    tile, fixed = (masks.make(name, weight) for name in ("tile", "1100"))
    form.write_rows(0, weight[:64], tile[:64])
    form.write_rows(64, weight[64:], fixed[64:])
    assert form.mask_period() is None
    again = Packed24.from_codes(form.values, masks.encode(tile))
    assert again.mask_period() == (4, 4, 14, 14)
    assert again.with_transpose().transposed.mask_period() == (4, 4, 14, 14)


def kernels_of(pattern):
    wide = ["wide"] if products.unsupported("wide", torch.bfloat16, DEVICE) is None else []
    return ["cusparselt", "thin", *wide, *(["folded"] if masks.PATTERNS[pattern].fixed else [])]


@pytest.mark.gpus(1)
@pytest.mark.parametrize("pattern", ["1100", "1010", "tile", "random"])
@pytest.mark.parametrize("batch", [0, 1, 127, 128, 129, 300])
def test_every_kernel_gives_the_same_product(pattern, batch):
    weight, mask, form = packed(pattern, N=192, K=320)
    x = torch.randn(batch, 320, device=DEVICE).bfloat16()
    bias = torch.randn(192, device=DEVICE).bfloat16()
    for b in (None, bias):
        truth = x.double() @ (weight * mask).double().t() + (0 if b is None else b.double())
        for kernel in kernels_of(pattern):
            found = form.product(x, b, kernel)
            assert found.shape == (batch, 192), kernel
            assert found.is_contiguous(), kernel
            error = (found.double() - truth).norm() / max(float(truth.norm()), 1e-9)
            assert error < 0.35 * torch.finfo(torch.bfloat16).eps, kernel


@pytest.mark.gpus(1)
@pytest.mark.parametrize("pattern", ["1100", "1001", "tile", "magnitude"])
@pytest.mark.parametrize("again", ["recompress", "rewrite"])
def test_kept_zeros_of_a_renewed_weight_reach_no_wrong_place_of_any_kernel(pattern, again):
    # cuSPARSELt looks for the places again, and may give a zero, and so its neighbour, another one.
    weight, mask, form = packed(pattern, N=192, K=320)
    form.with_transpose_if_possible()
    other = torch.randn_like(weight) * mask
    other *= torch.rand(weight.shape, device=DEVICE) < 0.6
    getattr(form, again)(other)
    x, dy = (torch.randn(40, n, device=DEVICE).bfloat16() for n in (320, 192))
    for kernel in kernels_of(pattern):
        if again == "recompress" and kernel != "cusparselt":
            with pytest.raises(ValueError, match="rewrite"):
                form.product(x, None, kernel)
            continue
        assert close(form.product(x, None, kernel), x.double() @ other.double().t()), kernel
    if form.has_transpose:
        for kernel in kernels_of("tile") if again == "rewrite" else ["cusparselt"]:
            back = form.transposed.product(dy, None, kernel)
            assert close(back, dy.double() @ other.double()), kernel
