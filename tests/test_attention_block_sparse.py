"""Block-sparse attention is exact over a pattern's pairs, and never touches other tiles.

On a GPU, or under Triton's interpreter (see conftest.py).
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockshock.attention import METHODS, block_sparse, blocks, patterns, reads, shapes, turns
from blockshock.kernels import flash, flash_plans
from blockshock.kernels.dropout import Dropout, kept_reference
from tests.attention_checks import DEVICE, DTYPES, check, problem, relative, results, truth

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
METHOD, ABLATION = METHODS["block_sparse"], METHODS["block_sparse_unpruned"]
# Three tiles a side on the CPU, the last one cut; rows of level and delta are padded to fours.
LONG = 1101 if DEVICE == "cuda" else 85


def scattered(*shape, share=0.1, seed=0):
    """A boolean mask in which most rows of tiles are touched, and some rows see nothing."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share
    mask[..., 3, :] = False
    return patterns.from_mask(mask.to(DEVICE))


# Intervals whose tiles do not follow each other.
GAPS = patterns.Pattern(
    "gaps",
    lambda b, h, i, j: (j >= i % 2 * (LONG - 20)) & (j < i % 2 * (LONG - 20) + 20),
    lambda i, Tk: (i % 2 * (LONG - 20), i % 2 * (LONG - 20) + 20),
)
PATTERNS = {
    "full": patterns.full,
    "causal": patterns.causal,
    "band": lambda: patterns.band(20),
    "causal_band": lambda: patterns.causal_band(7),
    "strided": lambda: patterns.strided(32, 4),
    "global_band": lambda: patterns.global_band(3, 10),
    "random_blocks": lambda: patterns.random_blocks(16, 0.2),
    "random_blocks_per_head": lambda: patterns.random_blocks(16, 0.2, per_head=True),
    "gaps": lambda: GAPS,
    "documents": lambda: patterns.documents([LONG // 2, 10, LONG - LONG // 2 - 10]),
    "predicate": lambda: patterns.predicate(lambda b, h, i, j: (i + j + h) % 3 == 0, per_head=True),
    "mask": lambda: scattered(LONG, LONG),
    "mask_per_head": lambda: scattered(2, 2, LONG, LONG),
    "mask_per_batch": lambda: scattered(2, 1, LONG, LONG),
    "nothing": lambda: patterns.from_mask(torch.zeros(LONG, LONG, dtype=torch.bool, device=DEVICE)),
}


def given_for(name, D):
    """A problem of one batch entry, or of two where the pattern tells them apart."""
    batch = 2 if name in ("mask_per_head", "mask_per_batch") else 1
    return problem(batch, 2, 1, LONG, LONG, D)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("method", [METHOD, ABLATION], ids=["pruned", "unpruned"])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_matches_float64(name, method):
    check(method, given_for(name, 16), pattern=PATTERNS[name]())


def split_into(monkeypatch, tiles):
    """Every list that is longer, into pieces of so many tiles."""
    monkeypatch.setattr(turns, "LONG", 0)
    monkeypatch.setattr(turns, "LEAST", tiles)
    monkeypatch.setattr(turns, "SHARE", 1000)
    monkeypatch.setattr(reads, "_KEPT", weakref.WeakKeyDictionary())


@pytest.mark.slow
def test_pieces_of_several_tiles_match_float64_and_drop_the_same(monkeypatch):
    given, pattern = problem(2, 2, 1, LONG, LONG, 40), PATTERNS["mask_per_head"]()
    whole = results(METHOD, *given, pattern=pattern, dropout=0.3, seed=5)
    split_into(monkeypatch, 2)
    check(METHOD, given, pattern=pattern)
    pieces = results(METHOD, *given, pattern=pattern, dropout=0.3, seed=5)
    assert all(relative(a, b) < 1e-6 for a, b in zip(pieces, whole, strict=True))


@pytest.mark.parametrize("name", PATTERNS)
def test_pieces_of_long_lists_match_float64(monkeypatch, name):
    split_into(monkeypatch, 1)
    given, pattern = given_for(name, 24), PATTERNS[name]()
    shape = shapes.Shape.of(given[0].shape, given[1].shape)
    table = METHOD.table(shape, given[0].dtype, False, pattern, given[0].device)
    assert (table.slots > 0) == (table.starts.diff() > 1).any()
    check(METHOD, given, pattern=pattern)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 128, 256] if DEVICE == "cuda" else [16])
@pytest.mark.parametrize("causal", [False, True], ids=["pattern", "and causal"])
@pytest.mark.parametrize("name", ["band", "global_band", "mask"])
def test_dtypes_and_heads_match_float64(name, causal, D, dtype):
    check(METHOD, problem(1, 4, 2, LONG, LONG, D, dtype), pattern=PATTERNS[name](), causal=causal)


@settings(max_examples=30 if DEVICE == "cuda" else 8, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_pattern_matches_float64(data):
    Tq, Tk = (data.draw(st.integers(1, 140)) for _ in range(2))
    pattern = data.draw(
        st.one_of(
            st.integers(0, 60).map(patterns.band),
            st.integers(0, 60).map(patterns.causal_band),
            st.integers(1, 40).map(lambda n: patterns.strided(n, n // 4)),
            st.integers(0, 9).map(lambda seed: patterns.random_blocks(16, 0.3, seed)),
            st.integers(0, 9).map(lambda seed: patterns.from_mask(_random(Tq, Tk, seed))),
        )
    )
    check(METHOD, problem(1, 2, 1, Tq, Tk, 16), pattern=pattern, causal=data.draw(st.booleans()))


def _random(Tq, Tk, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(Tq, Tk, generator=generator) < 0.05).to(DEVICE)


def test_rows_that_attend_to_nothing_are_zero_with_zero_gradients():
    given = problem(1, 2, 2, LONG, LONG, 16)
    mask = torch.ones(LONG, LONG, dtype=torch.bool, device=DEVICE)
    mask[5], mask[40:80], mask[:, 7] = False, False, False
    out, dq, dk, dv = results(METHOD, *given, pattern=patterns.from_mask(mask))
    for rows in (5, slice(40, 80)):
        assert not out[:, :, rows].any()
        assert not dq[:, :, rows].any()
    assert not dk[:, :, 7].any()
    assert not dv[:, :, 7].any()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("name", ["band", "random_blocks"])
def test_keys_and_values_of_untouched_tiles_are_never_loaded(name):
    q, k, v, d_out = problem(1, 1, 1, LONG, 2 * LONG, 16)
    pattern = patterns.both(PATTERNS[name](), patterns.predicate(lambda b, h, i, j: j < LONG // 2))
    expected = results(METHOD, q, k, v, d_out, pattern=pattern)
    shape = shapes.Shape.of(q.shape, k.shape)
    table = block_sparse.table(shape, q.dtype, False, pattern, q.device)
    begin = (
        -(-LONG // 2 // table.block_k) * table.block_k
    )  # no tile of keys from here on is touched
    assert not table.starts_t.diff()[0, begin // table.block_k :].any()
    k[:, :, begin:], v[:, :, begin:] = torch.nan, torch.nan
    found = results(METHOD, q, k, v, d_out, pattern=pattern)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)
    assert not found[2][:, :, begin:].any()
    assert ABLATION(q, k, v, pattern=pattern).isnan().any()  # which shows that NaN would be seen


def test_queries_of_untouched_tiles_do_not_reach_the_gradients_of_keys():
    q, k, v, d_out = problem(1, 1, 1, 2 * LONG, LONG, 16)
    pattern = patterns.predicate(lambda b, h, i, j: (i < 50) & (j <= i))
    expected = results(METHOD, q, k, v, d_out, pattern=pattern)
    q[:, :, LONG:], d_out[:, :, LONG:] = torch.nan, torch.nan
    found = results(METHOD, q, k, v, d_out, pattern=pattern)
    assert all(torch.equal(a, b) for a, b in zip(found[2:], expected[2:], strict=True))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_ablation_lists_all_tiles(name):
    shape = shapes.Shape(2, 2, 1, LONG, LONG, 16)
    pattern = PATTERNS[name]()
    pruned = METHOD.table(shape, torch.float16, False, pattern, torch.device(DEVICE))
    whole = ABLATION.table(shape, torch.float16, False, pattern, torch.device(DEVICE))
    assert whole.touched == whole.tiles == pruned.tiles
    nq, nk = pruned.starts.shape[1] - 1, pruned.starts_t.shape[1] - 1
    assert (whole.starts.diff() == nk).all()
    assert (whole.starts_t.diff() == nq).all()
    assert torch.equal(whole.full, pruned.full)
    assert ABLATION.table(shape, torch.float16, False, pattern, torch.device(DEVICE)) is whole


@pytest.mark.parametrize("name", ["band", "mask_per_head"])
@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_dropout_drops_what_its_reference_drops_forward_and_backward(name, rate):
    q, k, v, d_out = problem(2, 2, 1, LONG, LONG, 16)
    pattern, seed = PATTERNS[name](), 2**40 + 7
    found = results(METHOD, q, k, v, d_out, pattern=pattern, dropout=rate, seed=seed)
    dropout = Dropout(rate, seed)
    kept = kept_reference(dropout, 2, 2, LONG, LONG, DEVICE)

    def plain(q, k, v):
        keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
        token = torch.arange(LONG, device=DEVICE)
        b, h = (torch.arange(2, device=DEVICE).view(s) for s in ((2, 1, 1, 1), (1, 2, 1, 1)))
        mask = pattern.predicate(b, h, token.view(1, 1, -1, 1), token.view(1, 1, 1, -1))
        scores = (q @ keys.mT * 16**-0.5).masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1).nan_to_num() * kept * dropout.factor
        return weights @ values

    true = results(plain, *(x.double() for x in (q, k, v, d_out)))
    for own, exact in zip(found, true, strict=True):
        assert relative(own, exact) < 1e-5


def test_dropout_is_reproducible_and_keeps_its_share():
    q, k, v, d_out = problem(1, 2, 2, 90, 90, 16)
    first, again, other = (
        results(METHOD, q, k, v, d_out, dropout=0.3, seed=seed) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(METHOD(q, k, v, dropout=0.0, seed=3), METHOD(q, k, v))
    share = kept_reference(Dropout(0.3, 1), 2, 4, 200, 200).double().mean()
    assert abs(share - 0.7) < 5 * (0.21 / 320000) ** 0.5
    for wrong in ({"dropout": 1.0}, {"dropout": -0.1}, {"dropout": 0.5, "seed": -1}):
        with pytest.raises(ValueError, match=r"dropout = |seed = "):
            METHOD(q, k, v, **wrong)


def test_the_philox_reference_gives_the_published_words():
    # Known answers of Random123 (philox4x32 10): counter and key zero, and all ones.
    from blockshock.kernels import dropout

    kept = [
        dropout.kept_reference(Dropout(rate, 0), 1, 1, 1, 1).item()
        for rate in ((0x6627E8D5 + 0.4) / 2**32, (0x6627E8D5 + 0.6) / 2**32)
    ]
    assert kept == [True, False]


def test_heads_of_other_sizes_have_tiles_and_tables_of_their_own():
    pattern = patterns.band(9)
    for D in (16, 256, 16):  # the last from the cache
        given = problem(1, 1, 1, 90, 90, D)
        found, true = results(METHOD, *given, pattern=pattern), truth(*given, pattern=pattern)
        assert all(relative(a, b) < 1e-5 for a, b in zip(found, true, strict=True)), D
    sizes = {
        METHOD.table(
            shapes.Shape(1, 1, 1, 90, 90, D), torch.float32, False, pattern, DEVICE
        ).block_q
        for D in (16, 256)
    }
    assert len(sizes) == 2


def test_programs_take_their_turns_from_the_table():
    q, k, v, d_out = problem(1, 1, 1, 100, 100, 16)
    shape = shapes.Shape.of(q.shape, k.shape)
    table = METHOD.table(shape, q.dtype, False, patterns.band(20), q.device)
    lengths = table.starts.diff()[0]
    assert (lengths[table.turns[0, :, 0].long()].diff() <= 0).all()  # the longest first
    turns, turns_t = table.turns.clone(), table.turns_t.clone()
    turns[0, 0], turns_t[0, 0] = turns[0, 1], turns_t[0, 1]  # one tile has no turn
    left, left_t = int(table.turns[0, 0, 0]), int(table.turns_t[0, 0, 0])
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    wrong = replace(table, turns=turns, turns_t=turns_t)
    out = block_sparse._BlockSparse.apply(*inputs, None, wrong, Dropout())
    assert out[:, :, left * table.block_q : (left + 1) * table.block_q].isnan().all()
    dk = torch.autograd.grad(out, inputs, d_out)[1]
    assert dk[:, :, left_t * table.block_k : (left_t + 1) * table.block_k].isnan().all()


@pytest.mark.parametrize("name", ["band", "global_band", "mask_per_head"])
def test_the_tiles_of_a_full_gpu_match_float64_too(monkeypatch, name):
    monkeypatch.setattr(flash_plans, "PROCESSORS", 1)  # as if there were programs for all
    given = problem(2, 2, 1, LONG, LONG, 24, torch.float16)
    check(METHOD, given, pattern=PATTERNS[name]())
    assert flash_plans.chosen(given[0].shape, torch.float16, listed=True).forward.M == 64


@pytest.mark.gpus(1)
def test_a_captured_graph_keeps_the_lists_it_reads():
    given = problem(1, 2, 2, 500, 500, 64, torch.bfloat16)
    mask = torch.rand(500, 500, device=DEVICE) < 0.05
    pattern = patterns.from_mask(mask)
    q, k, v = (x.clone() for x in given[:3])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q + 1  # an empty graph warns
        with pytest.raises(RuntimeError, match="call block_sparse once with them before"):
            METHOD(q, k, v, pattern=pattern)
    torch.cuda.synchronize()
    expected = METHOD(q, k, v, pattern=pattern)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = METHOD(q, k, v, pattern=pattern)
    del pattern
    gc.collect()
    torch.cuda.synchronize()
    junk = [torch.full((100,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2000)]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    del junk


def test_an_empty_batch_has_empty_results():
    pattern = patterns.predicate(lambda b, h, i, j: j <= i + b, "mine", per_batch=True)
    given = problem(0, 2, 1, 20, 20, 16)
    for method in (METHOD, ABLATION):
        for found, x in zip(results(method, *given, pattern=pattern), given, strict=False):
            assert found.numel() == 0
            assert found.dim() == x.dim()


def test_a_table_of_other_tiles_is_refused():
    q, k, v, _ = problem(1, 1, 1, 90, 90, 16)
    table = blocks.table(patterns.band(3), 90, 90, block_q=128, block_k=128, device=DEVICE)
    with pytest.raises(ValueError, match="a table of 128 x 128 tiles: the kernels work in tiles"):
        flash.forward(q, k, v, scale=1.0, table=table)
