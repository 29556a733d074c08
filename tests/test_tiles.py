"""Tiles of a weight: exactly as many are kept as asked for, and sums reach each element once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockshock.block_sparse import tiles

quick = settings(max_examples=60, deadline=None)
sides = st.one_of(st.integers(1, 9), st.just(10**9))  # memory is for the weight alone
shapes = st.tuples(st.integers(1, 30), st.integers(1, 30))
blocks = st.tuples(sides, sides)


def whole(shape, seed=0):
    """Small whole numbers: their sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).float()


def elements(shape, block):
    """(tile row, tile column, row, column) of each element, by counting."""
    return [(i // block[0], j // block[1], i, j) for i in range(shape[0]) for j in range(shape[1])]


@quick
@given(shape=shapes, block=blocks)
def test_each_element_belongs_to_one_tile(shape, block):
    weight = whole(shape)
    rows, columns = tiles.grid(shape, block)
    values = torch.arange(rows * columns).view(rows, columns)
    expanded = tiles.expand(values, shape, block)
    sums, counts = torch.zeros(rows, columns), torch.zeros(rows, columns)
    for r, c, i, j in elements(shape, block):
        assert expanded[i, j] == values[r, c]
        sums[r, c] += weight[i, j]
        counts[r, c] += 1
    assert torch.equal(tiles.tile_sums(weight, block), sums)
    assert torch.equal(tiles.tile_sums(torch.ones(shape), block), counts)
    mean = tiles.magnitude(weight, block)
    assert torch.equal(mean, tiles.tile_sums(weight.abs(), block) / counts)
    mask = values % 2 == 0
    assert torch.equal(tiles.masked(weight, mask, block), weight * tiles.expand(mask, shape, block))


@quick
@given(
    levels=st.integers(1, 5),
    shape=shapes,
    sparsity=st.one_of(st.sampled_from([0.0, 0.29, 0.5, 0.8, 0.9]), st.floats(0, 0.99)),
)
def test_exactly_the_largest_are_kept_and_the_first_of_equal_ones(levels, shape, sparsity):
    scores = whole(shape, seed=1).clamp(-levels / 2, levels / 2)
    count = scores.numel()
    if count - round(sparsity * count, 6) < 1:
        with pytest.raises(ValueError, match="less than one tile"):
            tiles.keep_top(scores, sparsity)
        return
    mask = tiles.keep_top(scores, sparsity)
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    stays = tiles.kept(count, sparsity)
    assert int(mask.sum()) == stays == count - math.floor(round(sparsity * count, 6))
    best = sorted(range(count), key=lambda at: (-scores.flatten()[at].item(), at))[:stays]
    assert sorted(best) == mask.flatten().nonzero().flatten().tolist()
    assert torch.equal(tiles.keep_most(scores, torch.tensor(stays)), mask)


@pytest.mark.parametrize(
    ("count", "sparsity", "stays"),
    [(100, 0.29, 71), (10, 0.9, 1), (10, 0.7, 3), (5, 0.5, 3), (7, 0.1, 7), (1, 0.0, 1)],
)
def test_a_decimal_sparsity_rounds_as_on_paper(count, sparsity, stays):
    assert tiles.kept(count, sparsity) == stays


def test_a_dropped_tile_is_zero_whatever_stood_in_it():
    weight = torch.tensor([[1.0, math.inf], [math.nan, 2.0]])
    kept = torch.eye(2, dtype=torch.bool)
    assert torch.equal(tiles.masked(weight, kept, (1, 1)), torch.diag(torch.tensor([1.0, 2.0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_wide_and_masking_keeps_the_dtype(dtype):
    weight = torch.ones(63, 63, dtype=dtype)
    sums = tiles.tile_sums(weight, (63, 33))
    assert sums.tolist() == [[2079.0, 1890.0]]  # 2079 is no number of bfloat16 or float16
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert tiles.masked(weight, mask, (63, 33)).dtype == dtype


def test_views_and_other_strides_give_the_same():
    weight = whole((24, 16))
    for block in ((8, 4), (7, 5)):
        mask = tiles.keep_top(tiles.magnitude(weight, block), 0.5)
        other = weight.T.contiguous().T
        assert torch.equal(tiles.magnitude(other, block), tiles.magnitude(weight, block))
        assert torch.equal(tiles.masked(other, mask, block), tiles.masked(weight, mask, block))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, True, "0.5"])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"sparsity = .*from 0 to below 1"):
        tiles.check(4, sparsity, (16, 16))


@pytest.mark.parametrize("block", [0, -1, 2.0, (4,), (4, 4, 4), (4, True), True, "16"])
def test_a_block_that_is_none_is_refused(block):
    with pytest.raises(ValueError, match="block = "):
        tiles.check(block, 0.5, (16, 16))


def test_a_block_that_leaves_nothing_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"block = \(16, 16\) in a weight \[16, 64\].*smaller"):
        tiles.check(16, 0.8, (16, 64))
    assert tiles.check(16, 0.75, (16, 64)) == (16, 16)
