"""The lists of a tile mask name each kept tile once on either side, longest lines first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockshock.kernels import block_lists

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def masks(draw):
    R, C = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    share = draw(st.sampled_from([0.05, 0.3, 0.9]))
    seed = draw(st.integers(0, 99))
    mask = torch.rand(R, C, generator=torch.Generator().manual_seed(seed)) < share
    mask[draw(st.integers(0, R - 1))] = False
    mask[draw(st.integers(0, R - 1)), draw(st.integers(0, C - 1))] = True
    return mask.to(DEVICE)


def check(made, mask):
    kept = mask.nonzero()
    assert made.kept == len(kept)
    assert made.grid == tuple(mask.shape)
    assert torch.equal(made.lines.long(), kept[:, 0])
    assert torch.equal(made.mask(), mask)
    for side, of_side in ((made.rows, mask), (made.columns, mask.t())):
        entries = of_side.nonzero()
        assert torch.equal(side.others.long(), entries[:, 1])
        line, first, last = side.turns.long().unbind(1)
        counts = of_side.sum(1)
        assert torch.equal(line, counts.argsort(descending=True, stable=True))
        assert torch.equal(last - first, counts[line])
        assert torch.equal(first, (counts.cumsum(0) - counts)[line])
    rows = made.columns.others.long()
    columns = mask.t().nonzero()[:, 0]
    assert torch.equal(kept[made.numbers.long()], torch.stack([rows, columns], 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mask=masks())
def test_the_reference_names_each_tile_once_on_either_side(mask):
    check(block_lists.lists_reference(mask, int(mask.sum())), mask)


@settings(max_examples=40 if DEVICE == "cuda" else 8, deadline=None, derandomize=True)
@given(mask=masks())
def test_the_kernels_make_the_same_lists(mask):
    pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
    check(block_lists.lists_by_triton(mask, int(mask.sum())), mask)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_full_and_empty_masks(shape):
    full = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    check(block_lists.lists(full), full)
    nothing = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    assert block_lists.lists(nothing).kept == 0
    assert not block_lists.lists(nothing).rows.turns[:, 1:].any()


@pytest.mark.gpus(1)
def test_with_the_number_given_nothing_waits_for_the_device():
    mask = torch.rand(40, 50, device="cuda") < 0.2
    kept = int(mask.sum())
    block_lists.lists(mask, kept)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = block_lists.lists(mask, kept)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    check(made, mask)
