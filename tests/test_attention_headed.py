"""Some heads of a pattern see what these heads see in the whole one."""

import pickle

import pytest
import torch

from blockshock.attention import METHODS, patterns
from blockshock.attention.headed import some_heads


def masks(batch=None):
    g = torch.Generator().manual_seed(0)
    size = (6, 10, 10) if batch is None else (batch, 6, 10, 10)
    return (torch.rand(size, generator=g) < 0.5) | torch.eye(10, dtype=torch.bool)


def each_head(batch, head, query, key):
    return (query - key).abs() % 3 != head % 3


@pytest.mark.parametrize(
    "pattern",
    [
        patterns.from_mask(masks()),
        patterns.from_mask(masks(batch=2)),
        patterns.predicate(each_head, per_head=True),
        patterns.both(patterns.from_mask(masks()), patterns.band(4)),
        patterns.either(patterns.predicate(each_head, per_head=True), patterns.causal()),
    ],
    ids=lambda pattern: pattern.name,
)
@pytest.mark.parametrize("method", ["reference", "block_sparse"])
def test_attention_of_some_heads_is_that_of_all(pattern, method):
    q, k, v = torch.randn(3, 2, 6, 10, 16, generator=torch.Generator().manual_seed(1)).unbind()
    whole = METHODS["reference"](q, k, v, pattern=pattern)
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        own = some_heads(pattern, start, stop)
        for one in (own, pickle.loads(pickle.dumps(own))):
            parts = (x[:, start:stop] for x in (q, k, v))
            found = METHODS[method](*parts, pattern=one)
            torch.testing.assert_close(found, whole[:, start:stop], rtol=1e-5, atol=1e-5)


def test_a_mask_that_is_written_to_is_read_anew():
    mask = masks()
    own = some_heads(patterns.from_mask(mask), 4, 6)
    q, k, v = torch.randn(3, 1, 2, 10, 16).unbind()
    before = METHODS["block_sparse"](q, k, v, pattern=own)
    mask[4:] = True
    after = METHODS["block_sparse"](q, k, v, pattern=own)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, METHODS["reference"](q, k, v), rtol=1e-5, atol=1e-5)


def test_a_pattern_that_all_heads_share_is_itself():
    band = patterns.band(3)
    assert some_heads(band, 2, 4) is band


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (-1, 2), (3, 2), (5, 7)])
def test_heads_that_are_not_there_are_refused(start, stop):
    with pytest.raises(ValueError, match=f"heads {start} to {stop} of pattern mask"):
        some_heads(patterns.from_mask(masks()), start, stop)
