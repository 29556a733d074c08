"""A sync plan cuts the sublayers into the groups that its name says."""

import pytest
import torch

from blockshock.transformer.sums import Sums
from blockshock.transformer.sync import Place, Plan, advance, plan, run


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("tp", [1] * 24),
        ("24", [1] * 24),
        ("spd", [2] * 12),
        ("12", [2] * 12),
        ("spd12", [2] * 12),
        ("9", [2] * 6 + [4] * 3),
        ("6", [4] * 6),
        ("5", [4] * 3 + [6] * 2),
        ("4", [6] * 4),
        ("3", [8] * 3),
        ("2", [12] * 2),
        ("1", [24]),
        ("selective:[0, 1, 5]", [1, 1, 4, 18]),
        ("selective:[]", [24]),
        ("selective:[22, 23]", [23, 1]),
        ("desync:6", [4] * 6),
        ("parallel", [2] * 12),
    ],
)
def test_groups_of_twelve_blocks(name, sizes):
    found = plan(name, 12)
    assert [len(group) for group in found.groups] == sizes
    assert sum(found.groups, ()) == tuple(range(24))
    assert (found.name, found.syncs, found.depth) == (name, len(sizes), 12)
    assert found.dense == (len(sizes) == 24)
    kind = name.partition(":")[0]
    assert found.kind == (kind if kind in ("desync", "parallel") else "group")


@pytest.mark.parametrize("depth", range(1, 9))
def test_blocks_are_dealt_as_evenly_as_can_be_and_the_larger_groups_come_last(depth):
    for syncs in range(1, depth + 1):
        sizes = [len(group) for group in plan(str(syncs), depth).groups]
        assert len(sizes) == syncs
        assert sizes == sorted(sizes)
        assert sizes[-1] - sizes[0] in (0, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("13", "sync plan '13': 12 blocks have 1 to 12 syncs, or 24; .* selective"),
        ("25", "sync plan '25'"),
        ("0", "sync plan '0': use tp, spd, a number of syncs"),
        ("", "sync plan '': use tp"),
        ("tp12", "sync plan 'tp12': use tp"),
        ("desync", "sync plan 'desync': use tp"),
        ("desync:13", "sync plan '13'"),
        ("desync:parallel", "sync plan 'desync:parallel': desync takes the groups"),
        ("selective:[1, 0]", "give rising indices of sublayers, 0 to 23"),
        ("selective:[1, 1]", "give rising indices"),
        ("selective:[24]", "give rising indices"),
        ("selective:[-1]", "give rising indices"),
        ("selective:[true]", "give rising indices"),
        ("selective:[1", "give rising indices"),
        ("selective:3", "give rising indices"),
    ],
)
def test_a_name_that_is_no_plan_is_refused_with_its_fix(name, message):
    with pytest.raises(ValueError, match=message):
        plan(name, 12)


@pytest.mark.parametrize("groups", [(), ((0,),), ((0, 2), (1, 3)), ((0, 1), ()), ((1, 2),)])
def test_groups_that_are_no_sublayers_in_order_are_refused(groups):
    with pytest.raises(ValueError, match="each sublayer of each block must be in one group"):
        Plan("mine", groups)
    with pytest.raises(ValueError, match="kind = 'ring': use one of"):
        Plan("mine", ((0, 1),), "ring")


def steps(read):
    """Sublayers that write down what they read, and add 10, 20, …; their biases are 1, 2, …"""

    def step(number, h, D, place):
        read.append(h.item())
        return advance(h, D, torch.full((1,), 10.0 * number), torch.full((1,), number), place)

    return [lambda *args, n=n: step(n, *args) for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("name", "read"),
    [("tp", [0, 11, 33, 66]), ("1", [0, 11, 33, 66]), ("parallel", [0, 0, 33, 33])],
)
def test_one_rank_reads_the_stream_so_far_with_biases_once(name, read):
    found, biases = [], [torch.full((1,), float(n)) for n in (1, 2, 3, 4)]
    x = run(plan(name, 2), torch.zeros(1), steps(found), biases, Sums())
    assert found == read
    assert x.item() == 110


def test_desync_averages_streams_and_sums_the_current_partial():
    h, P, b = torch.tensor([[3.0], [5.0]]), torch.tensor([[1.0], [2.0]]), torch.tensor([0.5])
    ends = [advance(h[r], None, P[r], b, Place("desync", True, 2))[1] for r in range(2)]
    assert sum(ends).item() == 4 + 0.5 + 3
    assert advance(h[0], None, P[0], b, Place("desync", False, 2))[0].item() == 4.5
