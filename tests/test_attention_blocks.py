"""What a table of blocks promises: its lists are the mask, from both sides, and no element more."""

import gc
import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockshock.attention import blocks, patterns, reads, rules, tiles
from tests.attention_tables import check_lists, table_of
from tests.test_attention_patterns import made, mask

quick = settings(max_examples=60, deadline=None)
block_sizes = st.tuples(st.sampled_from((16, 32, 64, 128)), st.sampled_from((32, 64, 128)))
lengths = st.integers(0, 300)
planes = st.tuples(st.integers(1, 2), st.integers(1, 3))
seeds = st.integers(0, 2**31)


def planes_of(pattern, whole, planes):
    """[P, Tq, Tk] of a mask [batch, heads, Tq, Tk]: those planes that may differ."""
    some = whole[: planes[0] if pattern.per_batch else 1, : planes[1] if pattern.per_head else 1]
    return some.reshape(some.shape[0] * some.shape[1], *whole.shape[2:])


def random(shape, seed, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@st.composite
def patchy(draw):
    """Masks with whole tiles, empty tiles, empty rows and columns, and noise: [b, h, Tq, Tk]."""
    Tq, Tk, seed = draw(lengths), draw(lengths), draw(seeds)
    lead = draw(st.sampled_from(((), (1,), (3,), (1, 1), (2, 1), (1, 3), (2, 3))))
    patch = draw(st.sampled_from((16, 32, 40)))
    coarse = random((*lead, Tq // patch + 1, Tk // patch + 1), seed)
    fine = coarse.repeat_interleave(patch, -2).repeat_interleave(patch, -1)[..., :Tq, :Tk]
    noise = random((*lead, Tq, Tk), seed + 1, draw(st.sampled_from((0, 0.001, 0.3))))
    rows = random((*lead, Tq, 1), seed + 2, draw(st.sampled_from((0, 0.1, 0.9))))
    columns = random((*lead, 1, Tk), seed + 3, draw(st.sampled_from((0, 0.1))))
    return (fine ^ noise) & ~rows & ~columns


@quick
@given(pattern=made(), Tq=lengths, Tk=lengths, sizes=block_sizes, planes=planes)
@example(patterns.band(0), 1, 1, (16, 32), (1, 1))
@example(patterns.full(), 0, 5, (16, 32), (2, 3))
@example(patterns.full(), 5, 0, (16, 32), (2, 3))
@example(patterns.causal(), 0, 0, (16, 32), (1, 1))
@example(patterns.causal(), 300, 40, (16, 32), (1, 1))
@example(patterns.causal_band(3), 300, 40, (16, 32), (1, 1))
@example(patterns.random_blocks(16, 0.5, 0, True), 0, 40, (16, 32), (2, 3))
@example(patterns.random_blocks(16, 0.0, 0, True), 100, 40, (16, 32), (2, 3))
def test_tables_of_patterns_are_their_masks(pattern, Tq, Tk, sizes, planes):
    table = table_of(pattern, Tq, Tk, sizes, planes)
    check_lists(table, planes_of(pattern, mask(pattern, Tq, Tk, *planes), planes))


@quick
@given(given_mask=patchy(), sizes=block_sizes)
def test_tables_of_masks_are_the_masks(given_mask, sizes):
    pattern = patterns.from_mask(given_mask)
    *_, Tq, Tk = given_mask.shape
    whole = given_mask[(None,) * (4 - given_mask.dim())]
    table = table_of(pattern, Tq, Tk, sizes, whole.shape[:2])
    check_lists(table, planes_of(pattern, whole, whole.shape[:2]))


@pytest.mark.slow
@quick
@given(sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5), block=block_sizes)
def test_tables_of_documents_are_their_masks(sizes, block):
    T = sum(sizes)
    pattern = patterns.documents(sizes)
    for one in (pattern, patterns.both(pattern, patterns.causal_band(20))):
        check_lists(table_of(one, T, T, block), mask(one, T, T)[0])


@quick
@given(Tq=lengths, Tk=lengths, sizes=block_sizes, seed=seeds, empty=st.sampled_from((0, 0.5, 1)))
def test_intervals_need_not_be_neighbours(Tq, Tk, sizes, seed, empty):
    ends = torch.randint(-5, Tk + 6, (2, Tq), generator=torch.Generator().manual_seed(seed))
    low = ends.amin(0)
    # Short ones, so that the tiles of a block have gaps between them; some turned round: empty.
    high = torch.minimum(ends.amax(0), low + 40)
    high = torch.where(random((Tq,), seed, empty), low - 3, high)
    pattern = patterns.Pattern(
        "scattered",
        lambda b, h, q, k: (low[q] <= k) & (k < high[q]),
        lambda query, _: (low[query], high[query]),
    )
    table, whole = table_of(pattern, Tq, Tk, sizes), mask(pattern, Tq, Tk)[0]
    check_lists(table, whole)
    assert (table.low <= table.high).all()
    hidden = 1 - whole.float().mean().item() if whole.numel() else 0.0
    assert patterns.sparsity(pattern, Tq, Tk) == pytest.approx(hidden, abs=1e-6)


@quick
@given(pattern=made(), Tq=lengths, Tk=lengths, sizes=block_sizes)
def test_intervals_and_evaluation_find_the_same_tiles(pattern, Tq, Tk, sizes):
    if pattern.interval is None:
        return
    without = patterns.Pattern(pattern.name, pattern.predicate)
    a, b = table_of(pattern, Tq, Tk, sizes), table_of(without, Tq, Tk, sizes)
    for name in ("starts", "full", "keys", "splits", "starts_t", "full_t", "queries_t", "splits_t"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.masks < 0, b.masks < 0)
    assert torch.equal(a.masks_t < 0, b.masks_t < 0)


@pytest.mark.parametrize("chunk", [1, 16 * 32 * 3, 1 << 14])
def test_chunks_do_not_change_a_table(monkeypatch, chunk):
    given_mask = random((2, 3, 200, 180), 0) & (torch.arange(180) % 7 > 2)
    given_mask[1] = given_mask[0]  # the same bits in several chunks
    whole = table_of(patterns.from_mask(given_mask), 200, 180, (16, 32), (2, 3))
    largest = 0

    def watched(pattern, *at):
        nonlocal largest
        attends = original(pattern, *at)
        largest = max(largest, attends.numel())
        return attends

    original = rules.evaluate
    monkeypatch.setattr(rules, "CHUNK_CPU", chunk)
    monkeypatch.setattr(rules, "evaluate", watched)
    parts = table_of(patterns.from_mask(given_mask), 200, 180, (16, 32), (2, 3))
    assert largest <= max(chunk, 16 * 32)
    check_lists(parts, given_mask.view(6, 200, 180))
    for name in ("starts", "full", "keys", "starts_t", "queries_t", "turns", "turns_t"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert len(whole.bits) == len(parts.bits)


def test_bits_of_a_repeating_pattern_are_kept_once():
    pattern = patterns.predicate(lambda b, h, q, k: (q - k) % 4 == 0, "each fourth")
    table = table_of(pattern, 640, 640, (64, 64))
    assert table.touched == 100
    assert len(table.bits) == 1


def test_rows_with_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(tiles, "_hash", lambda rows: torch.zeros(len(rows), dtype=torch.int64))
    given_mask = random((200, 180), 0)
    table = table_of(patterns.from_mask(given_mask), 200, 180)
    check_lists(table, given_mask[None])


@quick
@given(rows=st.integers(0, 60), width=st.integers(1, 4), kinds=st.integers(1, 9), seed=seeds)
def test_distinct_rows_come_in_the_order_they_appear(rows, width, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    some = torch.randint(-(2**31), 2**31, (kinds, 2 * width), generator=generator).int()
    given_rows = some[torch.randint(0, kinds, (rows,), generator=generator)]
    unique, index = tiles.distinct(given_rows)
    assert torch.equal(unique[index], given_rows)
    seen = list(dict.fromkeys(tuple(row) for row in given_rows.tolist()))
    assert [tuple(row) for row in unique.tolist()] == seen


def test_an_expanded_mask_has_one_plane():
    given_mask = random((40, 50), 0).expand(2, 3, 40, 50)
    pattern = patterns.from_mask(given_mask)
    check_lists(table_of(pattern, 40, 50, (16, 32), (2, 3)), given_mask[0, :1])
    with pytest.raises(ValueError, match=r"heads 4: pattern .* was made for heads 3"):
        table_of(pattern, 40, 50, (16, 32), (2, 4))


@quick
@given(seed=seeds, share=st.sampled_from((0.0, 0.5, 1.0)))
def test_packing_puts_element_j_in_bit_j(seed, share):
    elements = random((3, 96), seed, share)
    words = tiles.pack(elements)
    assert torch.equal(tiles.unpack(words), elements)
    for word, some in zip(words.flatten().tolist(), elements.view(-1, 32).tolist(), strict=True):
        assert word & 0xFFFFFFFF == sum(bit << j for j, bit in enumerate(some))


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_plane_is_found_by_its_strides(per_batch, per_head):
    pattern = patterns.predicate(
        lambda b, h, q, k: (q + 3 * b * per_batch + 7 * h * per_head + k) % 11 == 0,
        "by plane",
        per_batch=per_batch,
        per_head=per_head,
    )
    table = table_of(pattern, 40, 50, (16, 32), (2, 3))
    found, whole = blocks.dense(table), mask(pattern, 40, 50, 2, 3)
    for b in range(2):
        for h in range(3):
            plane = b * table.batch_stride + h * table.head_stride
            assert torch.equal(found[plane], whole[b, h])


def test_a_table_is_made_once_and_goes_with_its_pattern():
    pattern = patterns.from_mask(torch.ones(40, 40, dtype=torch.bool))
    first = table_of(pattern, 40, 40)
    assert table_of(pattern, 40, 40) is first
    assert table_of(pattern, 40, 40, planes=(2, 3)) is first  # all planes see alike
    assert table_of(pattern, 40, 40, (32, 32)) is not first
    gone = weakref.ref(first)
    del first, pattern
    gc.collect()
    assert gone() is None


def test_a_pattern_keeps_the_tables_used_last():
    pattern = patterns.Pattern("mine", patterns.band(3).predicate)
    first = table_of(pattern, 1, 1)
    for T in range(2, blocks.KEPT + 1):
        table_of(pattern, T, T)
    assert table_of(pattern, 1, 1) is first
    table_of(pattern, 100, 100)  # one too many: the oldest, T = 2, goes
    assert table_of(pattern, 1, 1) is first
    assert len(reads.kept(pattern)["tables"]) == blocks.KEPT


def test_a_table_of_inference_can_be_saved_for_a_backward():
    with torch.inference_mode():
        table = table_of(patterns.Pattern("mine", patterns.band(3).predicate), 40, 40)
    assert not table.keys.is_inference()
    assert not table.bits.is_inference()


def test_long_bands_cost_their_tiles_only():
    table = table_of(patterns.band(256), 1 << 17, 1 << 17, (128, 128))
    assert table.touched == 1024 * 5 - 6
    assert table.ideal_speedup == pytest.approx(1024**2 / 5114)
    assert table.nbytes < 2 << 20
    assert table.build_seconds > 0


def test_more_tiles_than_int32_counts_are_refused():
    T = 1 << 20  # 2^16 x 2^15 tiles of 16 x 32, one too many
    with pytest.raises(ValueError, match="2147483648 tiles of 16 x 32 are touched"):
        table_of(patterns.full(), T, T)


def test_more_tiles_than_are_counted_are_refused_while_evaluating(monkeypatch):
    monkeypatch.setattr(tiles, "MOST", 5)
    with pytest.raises(ValueError, match="tiles of 16 x 32 are touched"):
        table_of(patterns.from_mask(torch.ones(64, 64, dtype=torch.bool)), 64, 64)


def test_sparsity_of_tiles_and_what_it_can_give():
    table = table_of(patterns.causal(), 64, 64, (32, 32))
    assert (table.touched, table.tiles) == (3, 4)
    assert table.touched_sparsity == 0.25
    assert table.ideal_speedup == pytest.approx(4 / 3)
    empty = table_of(patterns.random_blocks(16, 0), 64, 64, (32, 32))
    assert empty.ideal_speedup == float("inf")
    assert table_of(patterns.causal(), 0, 64, (32, 32)).touched_sparsity == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_q": 24}, "block_q 24: a multiple of 16"),
        ({"block_k": 48}, "block_k 48: a multiple of 32"),
        ({"block_q": 0}, "block_q 0: an int of at least 1"),
        ({"Tq": -1}, "Tq -1"),
        ({"heads": 2.0}, "heads 2.0"),
        ({"pattern": None}, "pattern None: make one"),
        ({"pattern": patterns.documents([3, 4])}, "Tq 40: pattern .* was made for Tq 7"),
        ({"pattern": patterns.predicate(lambda b, h, q, k: q - k, "mine")}, "torch.int64"),
    ],
)
def test_what_makes_no_table_is_refused(change, message):
    arguments = {"pattern": patterns.full(), "Tq": 40, "Tk": 40, "block_q": 16, "block_k": 32}
    with pytest.raises(ValueError, match=message):
        blocks.table(**(arguments | change))
