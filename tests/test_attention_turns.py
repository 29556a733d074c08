"""The turns that programs take: every tile once, the longest first, very long lists in pieces."""

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockshock.attention import patterns, reads, turns
from tests.attention_tables import check_lists, table_of
from tests.test_attention_blocks import block_sizes, lengths, quick
from tests.test_attention_patterns import made, mask


@quick
@given(pattern=made(), Tq=lengths, Tk=lengths, sizes=block_sizes, long=st.integers(1, 3))
def test_long_lists_are_split_into_pieces(pattern, Tq, Tk, sizes, long):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "LONG", long)
        patch.setattr(turns, "LEAST", 1)
        patch.setattr(turns, "SHARE", 1000)
        patch.setattr(reads, "_KEPT", weakref.WeakKeyDictionary())
        table = table_of(pattern, Tq, Tk, sizes)
    check_lists(table, mask(pattern, Tq, Tk)[0])
    for lists, count, mean in (
        (table.turns, table.starts.diff(), table.touched / max(1, table.full.numel())),
        (table.turns_t, table.starts_t.diff(), table.touched / max(1, table.full_t.numel())),
    ):
        if table.touched:
            assert (lists[:, :, 2] - lists[:, :, 1]).max() <= long * math.ceil(mean)
        assert (lists[:, :, 5] >= 0).any() == (count > long * math.ceil(mean)).any()


def test_slots_are_few_however_uneven_the_planes_are():
    mask_of_heads = torch.zeros(1, 16, 2048, 2048, dtype=torch.bool)
    for head in range(16):  # each has other long rows
        mask_of_heads[0, head, head * 128 : head * 128 + 128] = True
    table = table_of(patterns.from_mask(mask_of_heads), 2048, 2048, (32, 32), (1, 16))
    check_lists(table, mask_of_heads[0])
    assert table.slots <= 64 // 2
    assert table.slots_t <= 64 // 2


def test_only_lists_much_longer_than_the_others_are_split():
    for pattern in (patterns.full(), patterns.causal(), patterns.band(100)):
        table = table_of(pattern, 3000, 3000, (64, 64))
        assert table.slots == table.slots_t == 0
        assert table.turns.shape[1] == table.full.shape[1]
    table = table_of(patterns.global_band(40, 100), 3000, 3000, (64, 64))
    assert table.splits[:, 0].tolist() == table.splits_t[:, 0].tolist() == [0]
    assert table.slots >= 2
