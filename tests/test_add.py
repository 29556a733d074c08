"""Parts are added in float32, in the order given, and rounded once."""

import pytest
import torch

from blockshock.kernels import add

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
from blockshock.kernels import add_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts float32 off where it makes bf16 of it; a GPU rounds.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
ADDERS = {"kernel": add_triton.add_in_order, "public": add.add_in_order}


def parts_of(count, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(count, size, generator=generator)
    if dtype == torch.bfloat16 != HALF:
        parts = (4 * parts).round()  # sums of eight need no rounding
    return [part.to(DEVICE, dtype) for part in parts]


def poisoned(shape, dtype):
    return torch.full((shape,) if isinstance(shape, int) else shape, torch.nan).to(DEVICE, dtype)


@pytest.mark.parametrize("adder", ADDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", range(1, 9))
def test_up_to_eight_parts_match_the_reference(count, dtype, adder):
    for size in (1, 2049):  # neither fills a block of 2048
        parts = parts_of(count, size, dtype)
        before = [part.clone() for part in parts]
        out = poisoned(size, dtype)
        ADDERS[adder](parts, out)
        assert torch.equal(out, add.add_in_order_reference(parts))
        assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


@pytest.mark.parametrize("adder", ["kernel", "public", "reference"])
def test_the_order_given_is_the_order_of_the_sums(adder):
    def total(*numbers):
        parts = [torch.full((5, 3), number, device=DEVICE) for number in numbers]
        if adder == "reference":
            return add.add_in_order_reference(parts)
        out = poisoned((5, 3), torch.float32)
        ADDERS[adder](parts, out)
        return out

    large = 2.0**24  # 1 is lost beside it
    assert (total(large, 1.0, 1.0, -large) == 0).all()
    assert (total(1.0, 1.0, large, -large) == 2).all()
    assert (total(large, -large, 1.0, 1.0) == 2).all()
    assert (total(1.0, large, -large, 1.0) == 1).all()


@pytest.mark.parametrize("adder", ADDERS)
def test_16_bit_parts_are_summed_in_float32_and_rounded_once(adder):
    # A quarter of the last place of 1 is lost wherever it is rounded; three round up to a whole.
    eps = torch.finfo(HALF).eps
    parts = [torch.full((7,), v, dtype=HALF, device=DEVICE) for v in (1, *[eps / 4] * 3)]
    out = poisoned(7, HALF)
    ADDERS[adder](parts, out)
    assert (out == 1 + eps).all()


@pytest.mark.parametrize("adder", ADDERS)
def test_the_sum_may_replace_one_of_its_parts_or_some_rows(adder):
    parts = parts_of(3, 70, HALF)
    truth = add.add_in_order_reference(parts)
    whole = poisoned((4, 70), HALF)
    ADDERS[adder](parts, whole[2])
    assert torch.equal(whole[2], truth)
    assert whole[[0, 1, 3]].isnan().all()
    ADDERS[adder](parts, parts[1])
    assert torch.equal(parts[1], truth)


def test_more_than_eight_parts_are_refused():
    parts = parts_of(9, 4, torch.float32)
    with pytest.raises(ValueError, match="9 parts: the kernel adds at most 8"):
        add_triton.add_in_order(parts, poisoned(4, torch.float32))


def test_float64_is_not_narrowed_by_the_reference():
    parts = [torch.tensor([v], dtype=torch.float64) for v in (1.0, 2.0**-40)]
    assert add.add_in_order_reference(parts).item() == 1 + 2.0**-40
