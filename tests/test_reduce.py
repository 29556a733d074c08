"""Sums and gathers over ranks give every rank the same bits, and the right ones, in every way.

Many calls follow each other without a pause, their results are looked at afterwards: a buffer that
is used again too early, or a wait that is missing, shows as a wrong entry.
"""

from itertools import pairwise

import pytest
import torch

from blockshock.distributed import Ranks, exchange, joins, reduce
from blockshock.distributed.reduce import Plan
from tests import reduce_jobs as jobs

WAYS = [
    ("collective", 0),
    ("collective", 3),
    ("two_shot", 0),
    *(("exchange", chunks) for chunks in (0, 1, 2, 3, 8)),
]


def clean(answers):
    assert answers == [[]] * len(answers)


@pytest.fixture
def gpus(ranks):
    """The ranks, when they have a GPU each."""
    if ranks.device != "cuda":
        pytest.skip("the ranks are on the CPU")
    return ranks


@pytest.mark.parametrize("chunks", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("rows", [8, 100, 1000, 1537, 4096, 16384])
def test_chunks_are_whole_tiles_of_rows_and_nearly_alike(rows, chunks):
    bounds = exchange.cut(rows, chunks)
    sizes = [stop - start for start, stop in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, rows, chunks)
    tile = exchange.TILE if rows >= 2 * exchange.TILE * chunks else 1
    assert all(size % tile == 0 for size in sizes[:-1])
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) < 2 * tile


def reachable(monkeypatch, ranks=2):
    """GPUs that reach each other's memory, where there are none."""
    monkeypatch.setattr(reduce.collectives, "group_size", lambda group=None: ranks)
    monkeypatch.setattr(reduce.symmetric, "why_not", lambda group=None: None)
    return torch.bfloat16, torch.device("cuda")


def test_a_gather_is_in_one_piece_by_the_backend_or_by_the_mailboxes(monkeypatch):
    like = reachable(monkeypatch)
    backend, mailbox = Plan("collective"), Plan("exchange", 1)
    wanted = {"auto": [backend, mailbox], "collective": [backend], "exchange": [mailbox]}
    for how, plans in wanted.items():
        assert joins.Gather(how, 64, joins.side_by_side).plans(4096, *like) == plans
    (plan,) = joins.Gather("two_shot", 64, joins.side_by_side).plans(4096, *like)
    assert (plan.how, plan.reason) == ("collective", "a gather has no two shots")


def test_auto_may_take_every_way_and_what_is_asked_for_only_its_own(monkeypatch):
    like = reachable(monkeypatch)
    cut = [Plan("exchange", chunks) for chunks in (1, 4, 2, 8, 3, 6)]
    assert reduce.plans("exchange", 4096, 8192, *like) == cut
    assert reduce.plans("two_shot", 4096, 8192, *like) == [Plan("two_shot")]
    assert reduce.plans("collective", 4096, 8192, *like) == [Plan("collective")]
    several = [Plan("collective", 4), Plan("collective", 2)]
    assert reduce.plans("auto", 4096, 8192, *like) == [
        Plan("collective"), *cut, Plan("two_shot"), *several
    ]  # fmt: skip
    fp16 = reduce.plans("auto", 4096, 8192, torch.float16, like[1])
    assert Plan("two_shot") not in fp16  # PyTorch's kernel does not take it


def test_what_a_way_does_not_take_is_no_plan_of_auto_and_told_where_it_was_asked_for(monkeypatch):
    _, device = reachable(monkeypatch)
    for rows in (5, 4096):  # by one kernel, and in chunks
        plans = reduce.plans("auto", rows, 64, torch.float64, device)
        assert {plan.how for plan in plans} == {"collective"}
    for how, dtype in (("exchange", torch.float64), ("two_shot", torch.float16)):
        (plan,) = reduce.plans(how, 5, 64, dtype, device)  # a layer that was cast after its making
        assert (plan.how, plan.reason) == ("collective", reduce.unsupported(how, dtype, "cuda"))


def test_two_ranks_may_add_by_tiles_where_the_product_can_and_is_not_hidden(monkeypatch):
    like, by_tiles = reachable(monkeypatch), Plan("exchange", by_tiles=True)
    for how in ("auto", "exchange"):
        found = reduce.plans(how, 128, 64, *like, by_tiles=True)
        assert by_tiles in found[1:]
        assert [plan for plan in found if plan != by_tiles] == reduce.plans(how, 128, 64, *like)
        assert by_tiles not in reduce.plans(how, 127, 64, *like, by_tiles=True)
        assert by_tiles not in reduce.plans(how, 128, 64, *like, by_tiles=True, hide=True)
    assert by_tiles not in reduce.plans("collective", 128, 64, *like, by_tiles=True)
    monkeypatch.setattr(reduce.collectives, "group_size", lambda group: 4)
    assert by_tiles not in reduce.plans("auto", 128, 64, *like, by_tiles=True)


@pytest.mark.parametrize(("rows", "most"), [(1, 0), (127, 0), (255, 0), (256, 2), (1024, 8)])
def test_chunks_have_rows_enough_and_one_kernel_takes_small_messages(monkeypatch, rows, most):
    like = reachable(monkeypatch)
    plans = reduce.plans("exchange", rows, 64, *like)
    assert plans[:2] == [Plan("exchange"), Plan("exchange", 1)]
    assert max((plan.chunks for plan in plans[2:]), default=0) == most
    hidden = reduce.plans("auto", rows, 64, *like, hide=True)
    assert all(plan.chunks < 2 for plan in hidden)
    assert Plan("exchange") not in reduce.plans(
        "exchange", rows, 60 + 1, *like
    )  # no whole 16 bytes


def test_plans_are_told_in_words():
    assert str(Plan("collective")) == "collective"
    assert str(Plan("collective", reason="no two GPUs")) == "collective (no two GPUs)"
    assert str(Plan("collective", 4)) == "collective, 4 chunks"
    assert str(Plan("two_shot")) == "two_shot"
    assert str(Plan("exchange")) == "exchange, in one kernel"
    assert str(Plan("exchange", 1)) == "exchange, in one piece"
    assert str(Plan("exchange", 4)) == "exchange, 4 chunks"
    assert str(Plan("exchange", 4, "asked")) == "exchange, 4 chunks (asked)"


def test_what_a_way_does_not_take_is_named_with_what_does():
    for dtype in jobs.DTYPES.values():
        assert reduce.unsupported("auto", dtype, "cpu") is None
        assert reduce.unsupported("collective", dtype, "cpu") is None
        assert reduce.unsupported("exchange", dtype, "cuda") is None
        for how in ("two_shot", "exchange"):
            text = reduce.unsupported(how, dtype, "cpu")
            assert how in text
            assert "GPUs" in text
            assert "use 'collective'" in text
    assert reduce.unsupported("two_shot", torch.bfloat16, "cuda") is None
    assert "bf16, fp16 or fp32" in reduce.unsupported("exchange", torch.float64, "cuda")
    assert "bf16 or fp32" in reduce.unsupported("two_shot", torch.float16, "cuda")
    text = reduce.unsupported("ring", torch.bfloat16, "cuda")
    assert "'ring'" in text
    assert all(name in text for name in reduce.SUMS)


def test_one_rank_alone_sums_nothing():
    (plan,) = reduce.plans("exchange", 5, 8, torch.float32, torch.device("cpu"))
    assert plan == Plan("collective")
    x = torch.randn(5, 8)
    assert torch.equal(reduce.begin_sum(lambda rows: rows * 2, x, plan).wait(), x * 2)


def test_without_gpus_the_plan_is_collective_and_says_why(ranks):
    if ranks.device == "cuda":
        pytest.skip("the ranks have GPUs")
    asked = [(how, 5, 64, "fp32") for how in reduce.SUMS] + [("auto", 0, 64, "fp32")]
    for answers in ranks.run(jobs.plans, asked):
        by_name = dict(zip(reduce.SUMS, answers, strict=False))
        for how in ("auto", "two_shot", "exchange"):
            assert by_name[how] == ["collective (the ranks have no GPUs)"]
        assert by_name["collective"] == ["collective"]
        assert answers[-1] == ["collective"]  # nothing to sum


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_collective_sums_are_right_and_alike(ranks, dtype):
    shapes = [(1, 64), (63, 20), (0, 64), (5, 192), (1000, 8), (1, 4)]
    calls = [("collective", 0, *shape, dtype, hide) for hide in (False, True) for shape in shapes]
    clean(ranks.run(jobs.storm, calls))


def test_a_wrong_sum_would_be_told(ranks):
    calls = [("collective", 0, 5, 64, "fp32")]
    for problems in ranks.run(jobs.storm_with_a_lost_part, calls):
        assert len(problems) == 1
        assert "entries are wrong" in problems[0] or "far from" in problems[0]


@pytest.mark.parametrize("place", ["side_by_side", "place_pairs", "add_pairs"])
def test_gathered_parts_come_to_their_places(ranks, place):
    if ranks.size % 2:
        pytest.skip("an odd number of ranks has no pairs")
    on_gpu = ranks.device == "cuda"
    ways, dtype = (["collective", "exchange"], "bf16") if on_gpu else (["auto"], "fp32")
    for how in ways:
        for B in (0, 1, 5):
            for hide in (False, True):
                for right in ranks.run(jobs.gathered, place, how, B, hide, dtype):
                    assert right, (how, B, hide)


def test_four_ranks_sum_and_gather_as_two_do():
    with Ranks(4, device="cpu") as four:
        calls = [("collective", 0, 5, 64, "fp32", hide) for hide in (False, True)]
        clean(four.run(jobs.storm, calls))
        for place in ("side_by_side", "place_pairs", "add_pairs"):
            for hide in (False, True):
                assert all(four.run(jobs.gathered, place, "auto", 5, hide))


@pytest.mark.gpus(2)
@pytest.mark.parametrize("how", ["auto", "two_shot", "exchange"])
def test_all_ranks_have_the_same_plans_and_each_sums_right(gpus, how):
    shapes = [(B, N) for B in (1, 5, 192, 4096) for N in (60, 64, 4096)]  # 60: no whole 16 bytes
    dtypes = ["bf16", "fp32", *([] if how == "two_shot" else ["fp16"])]
    asked = [(how, B, N, dtype) for B, N in shapes for dtype in dtypes]
    answers = gpus.run(jobs.plans, asked)
    assert all(answer == answers[0] for answer in answers)
    most = max(map(len, answers[0]))
    calls = [(how, None, B, N, dtype) for _, B, N, dtype in asked for _ in range(most)]
    clean(gpus.run(jobs.storm, calls))


@pytest.mark.gpus(2)
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize(("how", "chunks"), WAYS)
def test_sums_of_all_sizes_back_to_back_are_exact(gpus, how, chunks, dtype):
    if reduce.unsupported(how, jobs.DTYPES[dtype], "cuda"):
        pytest.skip("this way does not take the dtype")
    batches = (4096, 1, 1000, 5, 192, 63, 4096)  # large, small, large
    calls = [(how, chunks, B, N, dtype) for N in (64, 4096) for B in batches]
    clean(gpus.run(jobs.storm, [call for call in calls if fits(*call)], repeat=3))


def fits(how, chunks, B, N, dtype):
    """One kernel takes only small messages."""
    from blockshock.distributed import symmetric

    size = B * N * jobs.DTYPES[dtype].itemsize
    return how != "exchange" or chunks > 0 or size <= symmetric.PUSH_BYTES


@pytest.mark.gpus(2)
@pytest.mark.parametrize("hide", [False, True])
def test_all_ways_in_turn_are_exact(gpus, hide):
    mixed = [
        ("exchange", 0, 192, 4096),
        ("exchange", 3, 1000, 4096),
        ("two_shot", 0, 63, 4096),
        ("gather", None, 192, 64),
        ("exchange", 8, 4096, 4096),
        ("exchange", 0, 1, 64),
        ("two_shot", 0, 4096, 4096, "fp32"),
        ("exchange", 1, 5, 64, "fp32"),
        ("collective", 0, 192, 4096),
        ("collective", 3, 1000, 4096),
        ("gather", None, 1, 4096, "fp32"),
        ("exchange", 2, 192, 4096, "fp16"),
    ]
    calls = [(*call, *["bf16"][len(call) - 4 :], hide) for call in mixed]
    clean(gpus.run(jobs.storm, calls, repeat=10))


@pytest.mark.gpus(2)
@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize(
    ("how", "chunks"),
    [("collective", 3), ("two_shot", 0), *(("exchange", chunks) for chunks in (0, 1, 3))],
)
def test_a_slow_rank_changes_no_bit(gpus, how, chunks, hide):
    shapes = [(192, 4096), (5, 64), (1000, 4096)]
    calls = [(how, chunks, *shape, "bf16", hide) for shape in shapes]
    calls += [("gather", None, 63, 64, "bf16", hide)] if how == "exchange" else []
    clean(gpus.run(jobs.storm, calls, repeat=5, cycles=2_000_000))  # about a millisecond each


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    "calls",
    [
        [("exchange", 0, 192, 4096)],
        [("exchange", 3, 1000, 4096)],
        [("two_shot", 0, 192, 4096)],
        [("collective", 4, 1000, 4096)],
        [("gather", None, 192, 64)],
        [("exchange", 0, 192, 4096), ("exchange", 0, 5, 64), ("exchange", 0, 192, 4096)],
        [
            ("exchange", 8, 4096, 4096),
            ("exchange", 0, 192, 4096),
            ("two_shot", 0, 63, 4096),
            ("exchange", 2, 192, 64, "fp32", True),
            ("gather", None, 5, 64),
        ],
    ],
    ids=["kernel", "chunks", "two_shot", "collective", "gather", "kernels", "mixed"],
)
def test_replayed_graphs_follow_their_inputs(gpus, calls):
    assert len(calls) % 2  # so that buffers that are used in turn do not start over at each replay
    clean(gpus.run(jobs.replay, calls, 7))
