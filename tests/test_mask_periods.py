"""The period of a mask: the codes that say it all, where it repeats."""

from itertools import combinations

import pytest
import torch

from blockshock import masks


def period_of(mask):
    return masks.period(masks.encode(mask))


@pytest.mark.parametrize("shape", [(4, 4), (4, 20), (12, 36), (64, 64)])
@pytest.mark.parametrize("pattern", ["1100", "1010", "1001", "tile"])
@pytest.mark.parametrize("term", [0, 1])
def test_a_mask_that_repeats_has_a_period_and_so_has_its_complement(pattern, term, shape):
    mask = masks.make(pattern, torch.zeros(shape))
    mask = ~mask if term else mask
    found = period_of(mask)
    assert len(found) == 4
    again = torch.zeros(4, 4, dtype=torch.bool)
    for row, code in enumerate(found):
        again[row, list(masks.places(code))] = True
    assert torch.equal(mask, again.repeat(shape[0] // 4, shape[1] // 4))
    assert (len(set(found)) == 1) == masks.PATTERNS[pattern].fixed
    if masks.PATTERNS[pattern].fixed:
        kept = masks.kept_columns(pattern, shape[1], term)
        assert torch.equal(kept[:2], torch.tensor(masks.places(found[0])))


@pytest.mark.parametrize("pattern", ["random", "magnitude", "tile_magnitude"])
def test_a_mask_that_does_not_repeat_has_no_period(pattern):
    mask = masks.make(pattern, torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    assert period_of(mask) is None
    assert period_of(~mask) is None


@pytest.mark.parametrize("pattern", ["1100", "1001", "tile"])
@pytest.mark.parametrize(("row", "group"), [(0, 0), (0, 8), (3, 1), (4, 0), (31, 8), (17, 5)])
def test_one_group_that_differs_ends_the_period(pattern, row, group):
    mask = masks.make(pattern, torch.zeros(32, 36))
    mask[row, 4 * group : 4 * group + 4] ^= True
    assert period_of(mask) is None


def test_places_are_the_two_of_the_code():
    for first, last in combinations(range(4), 2):
        assert masks.places(first | last << 2) == (first, last)
