"""What a pattern promises: its rule pair by pair, its intervals and sparsity, one object a rule."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention

from blockshock.attention import patterns, rules

quick = settings(max_examples=40, deadline=None)
lengths = st.integers(0, 90)
windows = st.integers(0, 70)


def mask(pattern, Tq, Tk, batch=1, heads=1):
    """bool [batch, heads, Tq, Tk] of the predicate."""
    b, h, i, j = (torch.arange(n) for n in (batch, heads, Tq, Tk))
    at = b[:, None, None, None], h[:, None, None], i[:, None], j
    return rules.evaluate(pattern, *at)


def ramp(Tq, Tk):
    return torch.arange(Tq)[:, None] - torch.arange(Tk)


@st.composite
def made(draw):
    """Any pattern that fits every size, sometimes joined with another."""
    simple = st.one_of(
        st.just(patterns.full()),
        st.just(patterns.causal()),
        windows.map(patterns.band),
        windows.map(patterns.causal_band),
        st.builds(patterns.strided, st.integers(1, 40), st.none() | windows),
        st.builds(patterns.global_band, st.integers(0, 20), windows),
        st.builds(
            patterns.random_blocks,
            st.integers(1, 50),
            st.sampled_from((0, 0.3, 1)),
            st.integers(-(2**70), 2**70),
            st.booleans(),
        ),
    )
    first = draw(simple)
    join = draw(st.sampled_from((None, patterns.both, patterns.either)))
    return join(first, draw(simple)) if join else first


@quick
@given(Tq=lengths, Tk=lengths, window=windows, tokens=windows, stride=st.integers(1, 50))
def test_builders_follow_their_formula(Tq, Tk, window, tokens, stride):
    ahead = ramp(Tq, Tk)
    i, j = torch.arange(Tq)[:, None], torch.arange(Tk)
    wanted = {
        patterns.full(): torch.ones(Tq, Tk, dtype=torch.bool),
        patterns.causal(): torch.ones(Tq, Tk, dtype=torch.bool).tril(),
        patterns.band(window): (-window <= ahead) & (ahead <= window),
        patterns.causal_band(window): (ahead >= 0) & (ahead <= window),
        patterns.strided(stride): (ahead.abs() <= stride) | (ahead.abs() % stride == 0),
        patterns.strided(stride, window): (ahead.abs() <= window) | (ahead.abs() % stride == 0),
        patterns.global_band(tokens, window): (ahead.abs() <= window) | (i < tokens) | (j < tokens),
    }
    for pattern, expected in wanted.items():
        assert torch.equal(mask(pattern, Tq, Tk)[0, 0], expected), pattern.name


@quick
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_documents_see_only_themselves(sizes):
    pattern = patterns.documents(sizes)
    T = sum(sizes)
    expected = torch.block_diag(*[torch.ones(n, n) for n in sizes]).bool()
    assert torch.equal(mask(pattern, T, T)[0, 0], expected)
    assert pattern.shape == (T, T)
    assert patterns.documents(torch.tensor(sizes)) is pattern


@quick
@given(pattern=made(), Tq=lengths, Tk=lengths)
def test_intervals_say_what_the_predicate_says(pattern, Tq, Tk):
    if pattern.interval is None:
        return
    low, high = rules.rows(pattern, Tq, Tk, "cpu")
    key = torch.arange(Tk)
    assert ((low >= 0) & (low <= high) & (high <= Tk)).all()
    inside = (low[:, None] <= key) & (key < high[:, None])
    assert torch.equal(inside, mask(pattern, Tq, Tk)[0, 0])


@quick
@given(pattern=made(), Tq=lengths, Tk=lengths, heads=st.integers(1, 3))
def test_sparsity_is_the_share_that_does_not_attend(pattern, Tq, Tk, heads):
    whole = mask(pattern, Tq, Tk, 2, heads)
    expected = 1 - whole.float().mean().item() if whole.numel() else 0.0
    found = patterns.sparsity(pattern, Tq, Tk, batch=2, heads=heads)
    assert found == pytest.approx(expected, abs=1e-6)


def test_sparsity_adds_up_over_chunks(monkeypatch):
    pattern = patterns.random_blocks(3, 0.4)
    whole = patterns.sparsity(pattern, 70, 90)
    for chunk in (1, 50, 1000):
        monkeypatch.setattr(rules, "CHUNK_CPU", chunk)
        assert patterns.sparsity(pattern, 70, 90) == whole


def test_the_ideal_speedup_is_that_of_the_work_left():
    assert patterns.ideal_speedup(0.75) == 4
    assert patterns.ideal_speedup(0.0) == 1
    assert patterns.ideal_speedup(1.0) == float("inf")


@quick
@given(pattern=made(), other=made())
def test_both_is_and_either_is_or(pattern, other):
    a, b = mask(pattern, 50, 70, heads=2), mask(other, 50, 70, heads=2)
    assert torch.equal(mask(patterns.both(pattern, other), 50, 70, heads=2), a & b)
    assert torch.equal(mask(patterns.either(pattern, other), 50, 70, heads=2), a | b)
    if pattern.interval and other.interval:
        assert patterns.both(pattern, other).interval


def test_random_blocks_keep_whole_blocks_and_about_their_share():
    kept = mask(patterns.random_blocks(8, 0.3, seed=5), 800, 1600)[0, 0]
    blocks = kept.view(100, 8, 200, 8)
    assert (blocks == blocks[:, :1, :, :1]).all()
    # 20000 draws: five standard deviations are 0.016
    assert abs(kept.float().mean().item() - 0.3) < 0.017
    lines = blocks[:, 0, :, 0].float()
    assert lines.mean(0).std() < 0.08  # 0.046 of 100 draws each: no column is favoured
    assert lines.mean(1).std() < 0.06


def test_random_blocks_differ_by_seed_and_by_head_if_asked():
    wanted = [mask(patterns.random_blocks(1, 0.5, seed), 60, 60) for seed in (0, 1, -1, 2**32)]
    wanted += [mask(patterns.random_blocks(1, 0.5, seed), 60, 60) for seed in (2**32 + 1, 2**63)]
    for index, one in enumerate(wanted):
        for other in wanted[:index]:
            assert 0.3 < (one == other).float().mean() < 0.7
    heads = mask(patterns.random_blocks(1, 0.5, per_head=True), 60, 60, heads=2)
    assert 0.3 < (heads[0, 0] == heads[0, 1]).float().mean() < 0.7
    alike = mask(patterns.random_blocks(1, 0.5), 60, 60, heads=2)
    assert torch.equal(alike[0, 0], alike[0, 1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_predicates_do_not_depend_on_the_type_of_the_indices(dtype):
    for pattern in (
        patterns.random_blocks(4, 0.5, 3),
        patterns.documents([20, 30]),
        patterns.from_mask(torch.rand(2, 1, 50, 50) > 0.5),
    ):
        i = torch.arange(50, dtype=dtype)
        zero = torch.zeros((), dtype=dtype)
        found = rules.evaluate(pattern, zero, zero, i[:, None], i)
        assert torch.equal(found, mask(pattern, 50, 50)[0, 0])


@quick
@given(pattern=made())
def test_predicates_run_as_flex_attention_runs_them(pattern):
    scalarwise = flex_attention.create_mask(pattern.predicate, 1, 2, 40, 50, device="cpu")
    assert torch.equal(scalarwise, mask(pattern, 40, 50, 1, 2))


@pytest.mark.parametrize(
    "shape", [(5, 7), (3, 5, 7), (2, 3, 5, 7), (2, 1, 5, 7), (1, 3, 5, 7), (2, 1, 1, 7), (5, 1)]
)
def test_a_mask_is_read_as_it_broadcasts(shape):
    given_mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    pattern = patterns.from_mask(given_mask)
    assert torch.equal(mask(pattern, 5, 7, 2, 3), given_mask.expand(2, 3, 5, 7))
    scalarwise = flex_attention.create_mask(pattern.predicate, 2, 3, 5, 7, device="cpu")
    assert torch.equal(scalarwise, given_mask.expand(2, 3, 5, 7))
    assert pattern.shape == ((5, 7) if 1 not in shape[-2:] else None)
    assert pattern.per_batch == (len(shape) == 4 and shape[0] > 1)
    assert pattern.per_head == (len(shape) > 2 and shape[-3] > 1)
    patterns.check(pattern, 5, 7, batch=2, heads=3)


def test_equal_arguments_give_the_same_object():
    def rule(b, h, q, k):
        return q >= k

    assert patterns.band(3) is patterns.band(window=3)
    assert patterns.strided(8) is patterns.strided(stride=8, window=None)
    assert patterns.random_blocks(16, 0.5) is patterns.random_blocks(block=16, seed=0, share=0.5)
    assert patterns.documents([3, 4]) is patterns.documents((3, 4))
    assert patterns.predicate(rule) is not patterns.predicate(rule)  # nothing keeps a lambda alive
    a, b = patterns.causal(), patterns.band(3)
    assert patterns.both(a, b) is patterns.both(a, b)
    assert patterns.both(a, b) is not patterns.either(a, b)


def test_joining_a_mask_does_not_keep_it():
    given_mask = torch.ones(4, 4, dtype=torch.bool)
    pattern = patterns.from_mask(given_mask)
    joined = weakref.ref(patterns.both(patterns.causal(), pattern))
    gone = weakref.ref(given_mask)
    assert joined() is patterns.both(patterns.causal(), pattern)
    del pattern, given_mask
    gc.collect()
    assert joined() is None
    assert gone() is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: patterns.band(-1), "window -1: an int of at least 0"),
        (lambda: patterns.band(2.5), "window 2.5"),
        (lambda: patterns.band([2]), r"window \[2\]"),
        (lambda: patterns.causal_band(True), "window True"),
        (lambda: patterns.strided(0), "stride 0: an int of at least 1"),
        (lambda: patterns.strided(4, -1), "window -1"),
        (lambda: patterns.global_band(-1, 4), "tokens -1"),
        (lambda: patterns.random_blocks(0, 0.5), "block 0"),
        (lambda: patterns.random_blocks(16, 1.5), "share 1.5: a share of blocks"),
        (lambda: patterns.random_blocks(16, float("nan")), "share nan"),
        (lambda: patterns.random_blocks(16, 0.5, seed=0.5), "seed 0.5"),
        (lambda: patterns.documents([]), "lengths is empty"),
        (lambda: patterns.documents([3, 0]), r"lengths\[1\] 0: an int of at least 1"),
        (lambda: patterns.documents([3, 2.0]), r"lengths\[1\] 2.0"),
        (lambda: patterns.documents(7), "lengths 7: a list of ints"),
        (lambda: patterns.documents(torch.tensor(7)), "lengths tensor"),
        (lambda: patterns.documents(torch.ones(2, 2).int()), r"lengths\[0\] \[1, 1\]"),
        (lambda: patterns.from_mask(torch.ones(3, 3)), "a mask of torch.float32: a bool tensor"),
        (lambda: patterns.from_mask([[True]]), "a mask of list"),
        (lambda: patterns.from_mask(torch.ones(3).bool()), r"a mask of shape \(3,\)"),
        (lambda: patterns.predicate(3), "fn 3: a function"),
        (lambda: patterns.both(patterns.full(), None), r"both\(None\): patterns are joined"),
        (
            lambda: patterns.both(patterns.documents([3]), patterns.documents([4])),
            "one fits Tq 3, the other Tq 4",
        ),
        (lambda: patterns.sparsity(patterns.documents([3]), 3, 4), "Tk 4: pattern documents"),
        (lambda: patterns.sparsity(patterns.full(), -1, 4), "Tq -1"),
        (lambda: patterns.sparsity("full", 1, 4), "pattern 'full'"),
        (
            lambda: patterns.sparsity(
                patterns.from_mask(torch.ones(3, 1, 4, 4).bool()), 4, 4, batch=2
            ),
            "batch 2: pattern mask.* was made for batch 3",
        ),
        (
            lambda: patterns.Pattern("odd", len, lambda query, Tk: (query, query), per_head=True),
            "has an interval and is per batch or per head",
        ),
    ],
)
def test_what_makes_no_pattern_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def even(batch, head, query, key):
    return (query + key) % 2 == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: patterns.band(4),
        lambda: patterns.random_blocks(16, 0.5, seed=3, per_head=True),
        lambda: patterns.documents([3, 4]),
        lambda: patterns.predicate(even, "even"),
        lambda: patterns.from_mask(torch.ones(7, 7, dtype=torch.bool).tril()),
        lambda: patterns.both(patterns.band(2), patterns.causal()),
        lambda: patterns.either(patterns.band(2), patterns.strided(3)),
    ],
)
def test_a_pattern_is_pickled_and_copied_by_its_recipe(make):
    pattern, token = make(), torch.arange(7)
    at = torch.zeros(()).long(), torch.zeros(()).long(), token[:, None], token
    for other in (pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern)):
        assert other.name == pattern.name
        assert torch.equal(
            patterns.evaluate(other, *at).expand(7, 7), patterns.evaluate(pattern, *at).expand(7, 7)
        )


def test_a_copied_pattern_of_a_builder_shares_its_tables():
    assert copy.deepcopy(patterns.band(4)) is patterns.band(4)


def test_numbers_that_no_index_reaches_are_refused():
    with pytest.raises(ValueError, match="below 2"):
        patterns.band(10**30)
