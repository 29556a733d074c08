"""What the tests of block tables share: every promise of a table, against the mask."""

import torch

from blockshock.attention import blocks


def table_of(pattern, Tq, Tk, sizes=(16, 32), planes=(1, 1)):
    return blocks.table(
        pattern, Tq, Tk, batch=planes[0], heads=planes[1], block_q=sizes[0], block_k=sizes[1]
    )


def check_turns(table, turns, splits, slots, seen, whole, starts, fulls, others, masks, together):
    """Each tile of each list is in one turn; the longest turns come first; slots are as said."""
    P, lines = fulls.shape
    assert turns.dtype == splits.dtype == torch.int32
    assert turns.is_contiguous()
    lengths = (turns[:, :, 2] - turns[:, :, 1]).long()
    assert (lengths >= 0).all()
    for_order = lengths.sum(0, keepdim=True) if together else lengths
    assert (for_order.diff(dim=1) <= 0).all()
    if together:  # the same lines and slots in all planes
        assert (turns[:, :, [0, 5]] == turns[:1, :, [0, 5]]).all()
    pieces = [first for line, first, last in splits.tolist() for first in range(first, last)]
    assert pieces == list(range(slots))
    of_slot = {slot: line for line, *ends in splits.tolist() for slot in range(*ends)}
    for p in range(P):
        in_slots = {slot: line for line, *_, slot in turns[p].tolist() if slot >= 0}
        assert in_slots == of_slot
        for line in range(lines):
            own = [turn[1:5] for turn in turns[p].tolist() if turn[0] == line]
            assert len(own) == max(1, sum(other == line for other in of_slot.values()))
            walked = sorted(at for first, last, _, _ in own for at in range(first, last))
            if not table.consecutive:
                assert walked == list(range(starts[p, line], starts[p, line + 1]))
                continue
            assert walked == seen[p, line].nonzero().flatten().tolist()
            full = sorted(at for _, _, first, last in own for at in range(first, last))
            assert full == (seen[p, line] & whole[p, line]).nonzero().flatten().tolist()
            for first, last, first_full, last_full in own:
                assert first <= first_full <= last_full <= last


def check_lists(table, expected):
    """Every promise of the module's docstring, against the mask [P, Tq, Tk], tile by tile."""
    bq, bk = table.block_q, table.block_k
    P, Tq, Tk = expected.shape
    assert (table.planes, table.Tq, table.Tk) == (P, Tq, Tk)
    nq, nk = -(-Tq // bq), -(-Tk // bk)
    padded = torch.zeros(P, nq * bq, nk * bk, dtype=torch.bool)
    padded[:, :Tq, :Tk] = expected
    grid = padded.view(P, nq, bq, nk, bk).transpose(2, 3)
    touched = grid.any(-1).any(-1)
    padded[:, Tq:] = True  # rows beyond Tq may be computed; columns beyond Tk may not
    full = grid.all(-1).all(-1)
    assert table.touched == int(touched.sum())
    assert table.tiles == P * nq * nk
    sides = (
        (touched, full, table.starts, table.full, table.keys, table.masks),
        (
            touched.mT,
            full.mT,
            table.starts_t,
            table.full_t,
            table.queries_t,
            table.masks_t,
        ),
    )
    for seen, whole, starts, fulls, others, masks in sides:
        lines = seen.shape[1]
        assert starts.shape == (P, lines + 1)
        assert fulls.shape == (P, lines)
        assert others.shape == masks.shape == (table.touched,)
        every = (starts, fulls, others, masks)
        assert all(each.dtype == torch.int32 and each.is_contiguous() for each in every)
        end = 0
        for p in range(P):
            for line in range(lines):
                start, stop, middle = starts[p, line], starts[p, line + 1], fulls[p, line]
                assert start == end
                end = int(stop)
                both = seen[p, line] & whole[p, line], seen[p, line] & ~whole[p, line]
                wanted = [part.nonzero().flatten().tolist() for part in both]
                assert others[start : start + middle].tolist() == wanted[0]
                assert others[start + middle : stop].tolist() == wanted[1]
                assert (masks[start : start + middle] == -1).all()
                assert (masks[start + middle : stop] >= 0).all()
        assert end == table.touched
    check_turns(table, table.turns, table.splits, table.slots, *sides[0], together=False)
    check_turns(table, table.turns_t, table.splits_t, table.slots_t, *sides[1], together=True)
    assert table.bits.dtype == torch.int32
    assert table.bits.shape[1:] == (bq, bk // 32)
    assert len(table.bits.flatten(1).unique(dim=0)) == len(table.bits)  # each once
    if table.low is None:
        assert sorted(set(table.masks.tolist()) - {-1}) == list(range(len(table.bits)))
    else:
        assert len(table.bits) == 0
        assert set(table.masks.tolist()) <= {-1, 0}
        assert table.low.dtype == table.high.dtype == torch.int32
    assert torch.equal(blocks.dense(table), expected)
    assert torch.equal(blocks.dense(table, transposed=True), expected)
