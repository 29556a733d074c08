"""Predicates and intervals: what they may do, and what is refused by name."""

import pytest
import torch

from blockshock.attention import METHODS, patterns, rules
from tests.test_attention_patterns import mask


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda b, h, q, k: q - k, "returned torch.int64: it must return a bool tensor"),
        (lambda b, h, q, k: True, "returned bool: it must return a bool tensor"),
        (
            lambda b, h, q, k: (q >= k)[:3],
            r"returned shape \(3, 9\) for indices of shapes \(8, 1\)",
        ),
        (lambda b, h, q, k: (q >= k)[None, None], r"returned shape \(1, 1, 8, 9\)"),
        (lambda b, h, q, k: (q >= k).to("meta"), "returned a tensor on meta for indices on cpu"),
    ],
)
def test_what_a_predicate_returns_is_checked(fn, message):
    with pytest.raises(ValueError, match=message):
        patterns.sparsity(patterns.predicate(fn, "mine"), 8, 9)


SLOPES = torch.tensor([0.1, 0.5, 2.0])
TABLE = torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(0)) > 0.5
REDUCED = {
    "all pairs": lambda b, h, q, k: (q >= k).any(),
    "keys": lambda b, h, q, k: (q >= k).all(-1),
    "keys, kept": lambda b, h, q, k: (q >= k).any(-1, keepdim=True),
    "queries": lambda b, h, q, k: (q >= k).any(0),
    "queries, kept": lambda b, h, q, k: (q >= k).any(0, keepdim=True),
    "first": lambda b, h, q, k: (q >= k)[0, 0],
    "constant": lambda b, h, q, k: torch.tensor(True),
    "of heads": lambda b, h, q, k: (h >= 0).any(),
}


@pytest.mark.parametrize("reduced", REDUCED)
@pytest.mark.parametrize("join", [None, patterns.both, patterns.either])
@pytest.mark.parametrize("sizes", [(8, 9), (9, 9), (1, 9), (9, 1), (1, 1)])
def test_a_predicate_that_reduces_is_refused_where_it_matters(reduced, join, sizes):
    pattern = patterns.predicate(REDUCED[reduced], "mine", per_head=True)
    pattern = join(pattern, patterns.causal()) if join else pattern
    if 1 not in sizes or "kept" not in reduced:  # kept, and of one pair: nothing was reduced
        with pytest.raises(ValueError, match=r"mine.*(several pairs|must broadcast|failed)"):
            mask(pattern, *sizes, heads=2)


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, q, k: q >= 0,
        lambda b, h, q, k: k < 5,
        lambda b, h, q, k: h == 1,
        lambda b, h, q, k: (b == 1) | (h == 0),
        lambda b, h, q, k: TABLE[h, q, k],
        lambda b, h, q, k: TABLE[1, q, k],
        lambda b, h, q, k: TABLE[b, 0, k],
    ],
)
def test_an_elementwise_predicate_may_read_some_indices_only(rule):
    pattern = patterns.predicate(rule, "mine", per_batch=True, per_head=True)
    expected = torch.zeros(2, 3, 8, 9, dtype=torch.bool)
    for at in torch.ones_like(expected).nonzero():
        expected[tuple(at)] = rule(*at)
    assert torch.equal(mask(pattern, 8, 9, 2, 3), expected)
    found = patterns.sparsity(pattern, 8, 9, batch=2, heads=3)
    assert found == pytest.approx(1 - expected.float().mean().item())
    joined = patterns.both(pattern, patterns.causal())
    assert torch.equal(mask(joined, 8, 9, 2, 3), expected & expected.new_ones(8, 9).tril())
    scalars = torch.zeros(4, dtype=torch.int64).unbind()
    assert torch.equal(rules.evaluate(pattern, *scalars), expected[0, 0, 0, 0])


def test_a_table_of_each_head_may_be_read_head_by_head():
    nested = patterns.predicate(lambda b, h, q, k: TABLE[h][q, k], "nested", per_head=True)
    keys = patterns.predicate(lambda b, h, q, k: TABLE[h][0][k], "nested keys", per_head=True)
    found = patterns.sparsity(nested, 8, 9, heads=3)
    assert found == pytest.approx(1 - TABLE.float().mean().item())
    found = patterns.sparsity(keys, 8, 9, heads=3)
    assert found == pytest.approx(1 - TABLE[:, 0].float().mean().item())


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(2).long(), torch.zeros(3).bool()])
def test_what_an_interval_gives_is_checked(bad):
    pattern = patterns.Pattern("mine", patterns.full().predicate, lambda query, Tk: (query, bad))
    with pytest.raises(ValueError, match="interval of pattern 'mine' gave"):
        patterns.sparsity(pattern, 3, 3)


@pytest.mark.parametrize(
    "rule", [lambda query, key: query >= key, lambda b, h, q, k: q >= k and k >= 0]
)
def test_a_predicate_that_fails_is_named_with_the_way_out(rule):
    with pytest.raises(ValueError, match=r"'mine' failed.*batch, head, query, key.*&"):
        patterns.sparsity(patterns.predicate(rule, "mine"), 8, 8)


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, q, k: k <= q + (k.max() - q.max()),
        lambda b, h, q, k: (q - k) <= (k - k.min()),
        lambda b, h, q, k: (k <= q).cumsum(-1) > 2,
        lambda b, h, q, k: (q >= k) & (k < 5).any(),
    ],
    ids=["max", "min", "cumsum", "any within"],
)
@pytest.mark.parametrize("join", [None, patterns.both, patterns.either])
def test_a_predicate_whose_answers_depend_on_what_else_is_asked_is_refused(rule, join):
    pattern = patterns.predicate(rule, "mine")
    pattern = join(pattern, patterns.band(3)) if join else pattern
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=r"mine.*(by the others|failed|several pairs)"):
            mask(pattern, 40, 50)


@pytest.mark.parametrize(
    "rule",
    [
        lambda b, h, q, k: (q.int() * torch.tensor(2654435761) + k) % 7 < 3,
        lambda b, h, q, k: (q - k).abs().half() * SLOPES[h] <= 5,
    ],
    ids=["promoted", "slopes"],
)
def test_an_elementwise_predicate_is_taken_whatever_its_dtypes(rule):
    pattern = patterns.predicate(rule, "mine", per_head=True)
    query, key, zero = torch.arange(8)[:, None], torch.arange(9), torch.tensor(0)
    seen = torch.stack([rule(zero, head, query, key) for head in torch.arange(3)]).float()
    found = patterns.sparsity(pattern, 8, 9, heads=3)
    assert found == pytest.approx(1 - seen.mean().item())
    q, k, v = torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 9, 16), torch.randn(1, 3, 9, 16)
    mean = seen @ v[0] / seen.sum(-1, keepdim=True).clamp(min=1)
    assert torch.allclose(METHODS["reference"](q, k, v, pattern=pattern)[0], mean, atol=1e-6)


def test_a_mask_that_ignores_its_indices_is_refused():
    table = torch.ones(40, 40, dtype=torch.bool).tril()
    pattern = patterns.predicate(lambda b, h, q, k: table, "mine")
    with pytest.raises(ValueError, match=r"mine.*(several pairs|must broadcast)"):
        mask(pattern, 40, 40)


@pytest.mark.parametrize("own", [False, True])
def test_a_pattern_compiles_whole(own):
    pattern = patterns.predicate(lambda b, h, q, k: q > k) if own else patterns.band(3)
    q, k, v = (torch.randn(1, 1, 12, 16) for _ in range(3))
    run = torch.compile(METHODS["reference"], backend="eager", fullgraph=True)
    out = run(q, k, v, pattern=pattern)
    assert torch.equal(out, METHODS["reference"](q, k, v, pattern=pattern))


def test_what_is_no_pattern_is_named():
    for wrong, message in (
        (patterns.causal, "pattern causal: call it"),
        (torch.ones(3, 4, dtype=torch.bool), r"torch.bool \(3, 4\): give a mask to from_mask"),
        (7, "pattern 7"),
    ):
        with pytest.raises(ValueError, match=message):
            patterns.check(wrong, 3, 4)
