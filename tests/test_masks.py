"""What a 2:4 mask promises: two of four, exact complements, the same bits however it is cut."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockshock import masks

PATTERNS = tuple(masks.PATTERNS)
FIXED = tuple(name for name, pattern in masks.PATTERNS.items() if pattern.fixed)
TRANSPOSABLE = tuple(name for name, pattern in masks.PATTERNS.items() if pattern.transposable)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

quick = settings(max_examples=40, deadline=None)
patterns = st.sampled_from(PATTERNS)
seeds = st.integers(-(2**70), 2**70)


@st.composite
def weights(draw, most_rows=24, most_columns=40):
    """Small weights of few distinct values: ties and zeros are common."""
    n = 4 * draw(st.integers(1, most_rows // 4))
    K = 4 * draw(st.integers(1, most_columns // 4))
    levels = draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(-levels, levels + 1, (n, K), generator=generator)
    return values.to(draw(st.sampled_from(DTYPES)))


def normal(n, K, seed=0):
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def kept_per_group(mask):
    return mask.unflatten(-1, (-1, 4)).sum(-1)


@quick
@given(pattern=patterns, weight=weights(), seed=seeds)
def test_every_pattern_keeps_two_of_four_and_so_does_its_complement(pattern, weight, seed):
    mask = masks.make(pattern, weight, seed=seed)
    assert mask.dtype == torch.bool
    assert mask.shape == weight.shape
    assert (kept_per_group(mask) == 2).all()
    assert (kept_per_group(~mask) == 2).all()
    masks.check_pair(mask, ~mask)
    if masks.PATTERNS[pattern].transposable:
        assert (kept_per_group(mask.T) == 2).all()


@quick
@given(pattern=patterns, cuts=st.lists(st.integers(1, 7), max_size=6), seed=seeds)
@example(pattern="random", cuts=[1, 1, 1, 1, 1, 1, 1], seed=0)
def test_cutting_a_weight_into_row_blocks_changes_no_bit(pattern, cuts, seed):
    weight = normal(512, 16)
    edges = sorted({0, 512, *(64 * cut for cut in cuts)})
    blocks = [masks.make(pattern, weight[a:b], start=a, seed=seed) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(blocks), masks.make(pattern, weight, seed=seed))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_working_in_small_pieces_changes_no_bit(pattern, monkeypatch):
    weight = normal(100, 36)
    whole = masks.make(pattern, weight, start=4, seed=5)
    monkeypatch.setattr(masks, "BLOCK_CPU", 8 * 36)
    assert torch.equal(masks.make(pattern, weight, start=4, seed=5), whole)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_layout_gradients_and_empty_blocks_change_nothing(pattern):
    weight = normal(16, 8)
    mask = masks.make(pattern, weight)
    assert torch.equal(masks.make(pattern, weight.T.contiguous().T), mask)
    assert torch.equal(masks.make(pattern, weight.clone().requires_grad_()), mask)
    assert masks.make(pattern, weight[:0]).shape == (0, 8)
    assert masks.make(pattern, weight[:, :0]).shape == (16, 0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_bits_on_a_gpu(pattern):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, found none")
    weight = normal(256, 512).bfloat16()
    on_gpu = masks.make(pattern, weight.cuda(), start=64, seed=9)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), masks.make(pattern, weight, start=64, seed=9))
    codes = masks.encode(on_gpu)
    assert torch.equal(masks.decode(masks.complement(codes)), ~on_gpu)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("term", [0, 1])
def test_kept_columns_are_those_of_the_mask(name, term):
    mask = masks.make(name, torch.zeros(3, 20))
    mask = mask if term == 0 else ~mask
    columns = masks.kept_columns(name, 20, term)
    assert columns.dtype == torch.int64
    assert torch.equal(mask, mask[:1].expand(3, 20))
    assert torch.equal(mask[0].nonzero()[:, 0], columns)


def test_pattern_attributes_say_what_the_masks_do():
    assert FIXED == ("1100", "1010", "1001")
    assert TRANSPOSABLE == ("tile", "tile_magnitude")
    weight, other = normal(8, 8, seed=1), normal(8, 8, seed=2)
    for name, pattern in masks.PATTERNS.items():
        same = torch.equal(masks.make(name, weight), masks.make(name, other))
        assert same != pattern.needs_weight, name


@quick
@given(weight=weights())
def test_magnitude_keeps_the_two_largest_and_the_lower_index_of_equals(weight):
    mask = masks.make("magnitude", weight)
    for values, kept in zip(
        weight.double().reshape(-1, 4).tolist(), mask.reshape(-1, 4).tolist(), strict=True
    ):
        ranked = sorted(range(4), key=lambda i, values=values: (-abs(values[i]), i))
        assert [i for i in range(4) if kept[i]] == sorted(ranked[:2])


def brute_force_tile(tile):
    """The best sum of |w| over all ways to keep two in every row and column."""
    pairs = list(combinations(range(4), 2))
    best = -1.0
    for rows in ((a, b, c, d) for a in pairs for b in pairs for c in pairs for d in pairs):
        counts = [sum(column in pair for pair in rows) for column in range(4)]
        if counts == [2, 2, 2, 2]:
            best = max(best, sum(tile[r][c] for r, pair in enumerate(rows) for c in pair))
    return best


@settings(max_examples=12, deadline=None)
@given(weight=weights(most_rows=8, most_columns=12))
def test_tile_magnitude_is_the_best_of_all_tiles(weight):
    mask = masks.make("tile_magnitude", weight)
    size = weight.double().abs()
    for r in range(0, weight.shape[0], 4):
        for c in range(0, weight.shape[1], 4):
            tile = size[r : r + 4, c : c + 4]
            kept = tile[mask[r : r + 4, c : c + 4]].sum().item()
            assert kept == brute_force_tile(tile.tolist())


def test_tile_magnitude_finds_each_of_the_90_tiles():
    weight = torch.cat([tile.float() * 2 - 1.5 for tile in masks.TILES], dim=1)  # 0.5 or -1.5
    mask = masks.make("tile_magnitude", weight)
    assert torch.equal(~mask, torch.cat(list(masks.TILES), dim=1))


def test_equal_weights_get_the_first_choice():
    for value in (0.0, -0.0, 3.0, -3.0):
        weight = torch.full((8, 8), value)
        assert torch.equal(masks.make("magnitude", weight), masks.make("1100", weight))
        assert torch.equal(masks.make("tile_magnitude", weight), masks.make("tile", weight))


def test_the_90_tiles_are_distinct_closed_under_complement_and_transposition():
    tiles = {tuple(tile.flatten().tolist()) for tile in masks.TILES}
    assert masks.TILES.shape == (90, 4, 4)
    assert masks.TILES.dtype == torch.bool
    assert len(tiles) == 90
    assert (masks.TILES.sum(1) == 2).all()
    assert (masks.TILES.sum(2) == 2).all()
    assert {tuple((~tile).flatten().tolist()) for tile in masks.TILES} == tiles
    assert {tuple(tile.T.flatten().tolist()) for tile in masks.TILES} == tiles
    assert masks.TILES[0].int().tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2


def splitmix(state):
    """Output of SplitMix64 for a state already advanced, in Python's unbounded integers."""
    wrap = (1 << 64) - 1
    z = state & wrap
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & wrap
    z = (z ^ z >> 27) * 0x94D049BB133111EB & wrap
    return z ^ z >> 31


def random_group(seed, row, group):
    golden = 0x9E3779B97F4A7C15
    row_seed = splitmix(splitmix(seed) + golden * (row + 1))
    drawn = splitmix(row_seed + golden * (group + 1))
    return list(combinations(range(4), 2))[(drawn >> 32) * 6 >> 32]


@quick
@given(seed=seeds, start=st.integers(0, 1 << 20))
def test_random_follows_splitmix64(seed, start):
    assert splitmix(1234567 + 0x9E3779B97F4A7C15) == 6457827717110365317  # the published stream
    mask = masks.make("random", torch.zeros(5, 24), start=start, seed=seed)
    for row in range(5):
        for group in range(6):
            kept = mask[row, 4 * group : 4 * group + 4].nonzero()[:, 0].tolist()
            assert tuple(kept) == random_group(seed, start + row, group)


def pair_indices(mask):
    codes = masks.encode(mask).long()
    order = torch.tensor([first | last << 2 for first, last in combinations(range(4), 2)])
    return (codes.unsqueeze(-1) == order).long().argmax(-1)


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_random_pairs_are_equally_frequent_and_neighbours_independent(seed):
    pairs = pair_indices(masks.make("random", torch.zeros(1024, 1024), seed=seed))
    # 99.9999 % quantiles of chi-square: 5 degrees of freedom 36, 35 degrees 95
    assert chi_square(pairs.flatten().bincount(minlength=6).double()) < 36
    right = pairs[:, :-1] * 6 + pairs[:, 1:]
    below = pairs[:-1] * 6 + pairs[1:]
    chunk_on = pairs[:-64] * 6 + pairs[64:]
    across = pairs[:-1, :-1] * 6 + pairs[1:, 1:]
    for joint in (right, below, chunk_on, across):
        assert chi_square(joint.flatten().bincount(minlength=36).double()) < 95
    for column in pairs.T[:8]:
        assert chi_square(column.bincount(minlength=6).double()) < 36


def test_random_masks_of_two_seeds_are_independent():
    zeros = torch.zeros(512, 512)
    pairs = [pair_indices(masks.make("random", zeros, seed=seed)) for seed in (7, 8, 7 + 2**32, -7)]
    for a, b in combinations(pairs, 2):
        assert chi_square((a * 6 + b).flatten().bincount(minlength=36).double()) < 95
    again = pair_indices(masks.make("random", zeros, seed=7))
    assert torch.equal(again, pairs[0])


@quick
@given(pattern=patterns, weight=weights(), seed=seeds)
def test_codes_round_trip(pattern, weight, seed):
    mask = masks.make(pattern, weight, seed=seed)
    codes = masks.encode(mask)
    assert codes.dtype == torch.uint8
    assert codes.shape == (weight.shape[0], weight.shape[1] // 4)
    assert torch.equal(masks.decode(codes), mask)
    assert torch.equal(masks.complement(codes), masks.encode(~mask))
    assert torch.equal(masks.complement(masks.complement(codes)), codes)


def test_code_is_the_first_position_and_four_times_the_last():
    for first, last in combinations(range(4), 2):
        mask = torch.zeros(1, 4, dtype=torch.bool)
        mask[0, [first, last]] = True
        assert masks.encode(mask).item() == first | last << 2


@quick
@given(pattern=st.sampled_from(TRANSPOSABLE), weight=weights())
def test_codes_transpose_as_the_mask_does_whole_or_by_blocks(pattern, weight):
    mask = masks.make(pattern, weight)
    codes = masks.encode(mask)
    turned = masks.transpose(codes)
    assert torch.equal(masks.decode(turned), mask.T)
    assert torch.equal(masks.transpose(turned), codes)
    blocks = [masks.transpose(codes[i : i + 4]) for i in range(0, len(codes), 4)]
    assert torch.equal(torch.cat(blocks, dim=1), turned)


def test_check_names_row_group_and_count():
    mask = masks.make("1010", torch.zeros(8, 16))
    mask[5, 9] = True
    with pytest.raises(ValueError, match=r"row 5, group 2 \(columns 8 to 11\) keeps 3 of four"):
        masks.check(mask)
    mask[5, 8:12] = False
    with pytest.raises(ValueError, match=r"row 5, group 2 .* keeps 0 of four"):
        masks.encode(mask)


@quick
@given(pattern=patterns, weight=weights(), where=st.integers(0, 10**6))
def test_one_flipped_bit_is_found(pattern, weight, where):
    mask = masks.make(pattern, weight)
    flipped = mask.clone()
    flipped.view(-1)[where % mask.numel()] ^= True
    for refused in (
        lambda: masks.check(flipped),
        lambda: masks.check_pair(mask, ~flipped),
        lambda: masks.check_transposable(flipped),
    ):
        with pytest.raises(ValueError, match=f"row {where % mask.numel() // mask.shape[1]}, "):
            refused()


def test_check_pair_names_the_place():
    a = masks.make("1100", torch.zeros(2, 8))
    b = ~a
    b[1, 4:8] = torch.tensor([True, False, False, True])
    with pytest.raises(ValueError, match="both keep row 1, column 4"):
        masks.check_pair(a, b)
    with pytest.raises(ValueError, match="neither keeps row 1, column 4"):
        masks.check_pair(~a, ~b)
    with pytest.raises(ValueError, match=r"\(2, 8\) and \(1, 8\)"):
        masks.check_pair(a, b[:1])


def test_a_mask_that_is_not_transposable_is_refused_with_the_place():
    mask = masks.make("tile", torch.zeros(8, 8))
    mask[6] = ~mask[6]
    place = r"column 0, rows 4 to 7 keep 3 of four"
    with pytest.raises(ValueError, match=place):
        masks.check_transposable(mask)
    with pytest.raises(ValueError, match=place):
        masks.transpose(masks.encode(mask))
    with pytest.raises(ValueError, match="6 rows"):
        masks.check_transposable(masks.make("1100", torch.zeros(6, 8)))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_place(pattern, value):
    weight = normal(8, 8)
    weight[6, 3] = value
    with pytest.raises(ValueError, match=f"is {value} at row 70, column 3"):
        masks.make(pattern, weight, start=64)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(8, 6), (8,), (2, 4, 4)])
def test_groups_that_do_not_fit_are_refused(pattern, shape):
    with pytest.raises(ValueError, match="K a multiple of 4"):
        masks.make(pattern, torch.zeros(shape))


@pytest.mark.parametrize("pattern", TRANSPOSABLE)
def test_tiles_that_do_not_fit_are_refused(pattern):
    with pytest.raises(ValueError, match=r"6 rows from row 0: .* multiples of 4"):
        masks.make(pattern, torch.zeros(6, 8))
    with pytest.raises(ValueError, match="8 rows from row 2"):
        masks.make(pattern, torch.zeros(8, 8), start=2)


def test_names_and_terms_that_do_not_exist_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"'0011'; use one of 1100, .* tile_magnitude"):
        masks.make("0011", torch.zeros(4, 4))
    with pytest.raises(ValueError, match="use one of 1100, 1010, 1001"):
        masks.kept_columns("tile", 8, 0)
    with pytest.raises(ValueError, match="term 2"):
        masks.kept_columns("1100", 8, 2)
    with pytest.raises(ValueError, match="K = 6"):
        masks.kept_columns("1100", 6, 0)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        masks.check(torch.ones(4, 4))
