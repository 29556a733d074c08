"""The parent's part: which cases it asks the ranks for, in which order, and who is blamed.

The ranks are stand-ins that answer at once.
"""

from dataclasses import replace

import pytest

from blockshock.linear import METHODS
from blockshock.phases import engine, session
from blockshock.phases.engine import Options
from blockshock.phases.families import FAMILIES
from blockshock.phases.linear.case import LinearCase as Case
from blockshock.phases.session import CaseFailed, Laboratory


def cases(phase, methods):
    return [Case(phase, method, N=128, B=32) for method in methods]


def test_a_case_that_lacks_memory_beside_others_is_tried_alone():
    asked = []

    class Pool:
        size, device = 2, "cpu"

        def run(self, function, *args, timeout=None):
            if function is engine.measure_ceilings:
                return [{}] * 2
            asked.append([case.method for case in args[0]])
            raise session.RankFailure(
                "no memory", kind="raised", rank=0, exc_type="OutOfMemoryError",
                note=f"checking {args[0][-1].id}",
            )  # fmt: skip

    lab = Laboratory(Pool(), Options())
    point = cases("forward", ["dense_single", "dense_tp_row"])
    with pytest.raises(CaseFailed, match="no memory"):
        lab.result(point[0], point)
    assert asked == [["dense_single", "dense_tp_row"], ["dense_tp_row"], ["dense_single"]]


class Crowd:
    """Ranks with room for two cases at a time."""

    size, device = 2, "cpu"

    def __init__(self, room=2):
        self.room, self.asked = room, []

    def run(self, function, *args, timeout=None):
        if function is engine.measure_ceilings:
            return [{}] * 2
        self.asked.append([case.method for case in args[0]])
        measured, left = args[0][: self.room], args[0][self.room :]
        outcomes = [{"failed": f"measured in turn {len(self.asked)}"} for _ in measured]
        return [outcomes + [{"refused": "no room", "crowded": True} for _ in left]] * 2


def test_cases_without_room_beside_their_neighbours_are_measured_after_them_together():
    point = cases("forward", list(METHODS)[:5])
    names = [case.method for case in point]
    lab = Laboratory(pool := Crowd(), Options())
    for case, turn in zip(point, (1, 1, 2, 2, 3), strict=True):
        with pytest.raises(CaseFailed, match=f"measured in turn {turn}"):
            lab.result(case, point)
    assert pool.asked == [names, names[2:], names[4:]]


def test_cases_of_which_none_has_room_are_tried_alone_and_their_reason_told():
    lab = Laboratory(pool := Crowd(room=0), Options())
    point = cases("forward", ["dense_single", "dense_tp_row"])
    with pytest.raises(CaseFailed, match="no room"):
        lab.result(point[0], point)
    assert pool.asked == [["dense_single", "dense_tp_row"], ["dense_single"], ["dense_tp_row"]]


class Measured:
    """Ranks that measured every case but the last, which was wrong."""

    size, device = 1, "cpu"

    def run(self, function, *args, timeout=None):
        if function is engine.measure_ceilings:
            return [{}]
        *right, _ = args[0]
        outcome = {
            "times": [4.0, 1.0, 2.0, 8.0],
            "timing": {"calls_per_sample": 1},
            "errors": {},
            "regions": {"total": {"p50": 1.0}},
            "memory": {},
            "floor": {"seconds": 1.5},
        }
        return [[dict(outcome) for _ in right] + [{"failed": "wrong"}]]


@pytest.fixture
def learnt(monkeypatch):
    found = []
    family = replace(FAMILIES["linear"], learn=lambda done, run: found.append(done))
    monkeypatch.setitem(FAMILIES, "linear", family)
    return found


def test_a_family_learns_from_what_was_measured_side_by_side(learnt):
    names = ["dense_single", "dense_tp_row", "block_shock"]
    point = [Case("forward", name, N=128, B=32, ranks=1) for name in names]
    lab = Laboratory(Measured(), Options())
    for case in point[:2]:
        lab.result(case, point)
    (told,) = learnt
    assert [case for case, _, _ in told] == point[:2]
    assert [samples for _, samples, _ in told] == [[4.0, 1.0, 2.0, 8.0]] * 2


def test_rates_are_of_the_true_median():
    case = Case("forward", "dense_single", N=128, B=32, ranks=1)
    _, info = Laboratory(Measured(), Options()).result(case, [case, replace(case, B=8)])
    assert info["rates"]["tokens_per_s"] == 32 / 3.0
    assert info["rates"]["limit_fraction"] == 0.5


class BrokenCeilings:
    """Ranks that fail to measure the ceilings so many times."""

    size, device = 2, "cpu"

    def __init__(self, failures):
        self.failures, self.calls = failures, 0

    def run(self, function, *args, timeout=None):
        if function is not engine.measure_ceilings:
            return [[{"failed": "measured"} for _ in args[0]]] * 2
        self.calls += 1
        if self.calls <= self.failures:
            raise session.RankFailure("rank 1 was killed", kind="exited", rank=1)
        return [{}] * 2


@pytest.mark.parametrize(("failures", "told"), [(1, "measured"), (2, "at most .*rank 1 was kill")])
def test_ceilings_that_fail_are_tried_once_more_and_then_fail_the_cases(failures, told):
    pool = BrokenCeilings(failures)
    lab = Laboratory(pool, Options())
    point = cases("forward", ["dense_single", "dense_tp_row"])
    for case in (*point, *cases("backward", ["dense_single"])):
        with pytest.raises(CaseFailed, match=told):
            lab.result(case, point if case in point else [case])
    assert pool.calls == 2


@pytest.mark.parametrize("time", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_time_that_is_none_fails_its_case_alone(time):
    outcome = {"times": [1.0, time], "timing": {"calls_per_sample": 1}}
    failed = session._merge(*cases("forward", ["dense_single"]), [outcome], "cpu", {})
    assert isinstance(failed, CaseFailed)
    assert "forward/dense_single-N128-B32-bf16: 1 of 2 times" in str(failed)
