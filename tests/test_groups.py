"""What is kept for a process group goes with it, and its shared memory has one use at a time."""

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from blockshock.distributed import groups, symmetric
from blockshock.distributed.groups import ByGroup
from blockshock.distributed.uses import Uses
from tests import group_jobs as jobs


class Group:
    """Stands for a process group."""


class Stream:
    """Stands for a CUDA stream: what it waits for, in order; inside a capture or not."""

    def __init__(self, name, capturing=False):
        self.name, self.capturing, self.waited = name, capturing, []

    def wait_event(self, event):
        self.waited.append(event.recorded)

    def wait_stream(self, stream):
        self.waited.append(stream.name)


class Event:
    """Stands for a CUDA event."""

    recorded = None

    def record(self, stream):
        self.recorded = stream.name


class Device:
    """Stands for CUDA: the current stream is the one that was set last."""

    def __init__(self, monkeypatch):
        self.current = None
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", self._capturing)
        monkeypatch.setattr(torch.cuda, "stream", self._looked_at)
        self._looked = None

    def use(self, uses, stream):
        """One use, in a stream; what the stream waited for before it."""
        self.current, stream.waited = stream, []
        with uses:
            pass
        return stream.waited

    def _capturing(self):
        return (self._looked or self.current).capturing

    def _looked_at(self, stream):
        self._looked = stream
        return _Then(lambda: setattr(self, "_looked", None))


class _Then(nullcontext):
    def __exit__(self, *_):
        self.enter_result()


@pytest.fixture
def cuda(monkeypatch):
    return Device(monkeypatch)


def test_a_use_waits_for_the_one_before_in_another_stream_and_for_none_in_its_own(cuda):
    uses, one, two = Uses(), Stream("one"), Stream("two")
    found = [cuda.use(uses, stream) for stream in (one, one, two, two, one)]
    assert found == [[], [], ["one"], [], ["two"]]


def test_uses_of_a_capture_wait_for_each_other_and_for_nothing_outside(cuda):
    uses, outside = Uses(), Stream("outside")
    one, two = Stream("one", capturing=True), Stream("two", capturing=True)
    found = [cuda.use(uses, stream) for stream in (outside, one, two, one)]
    assert found == [[], [], ["one"], ["two"]]
    one.capturing = two.capturing = False  # the capture has ended
    assert cuda.use(uses, two) == ["outside"]
    one.capturing = True  # another capture, which the second stream is not in
    assert cuda.use(uses, one) == []


def test_a_use_inside_another_is_refused_and_the_next_one_is_free(cuda):
    uses, stream = Uses(), Stream("one")
    cuda.current = stream
    with uses, pytest.raises(RuntimeError, match="began inside another one; wait for the pending"):
        uses.begin()
    with pytest.raises(KeyError), uses:
        raise KeyError
    assert cuda.use(uses, Stream("two")) == ["one"]


def test_another_thread_waits_until_a_use_is_whole(cuda):
    uses, seen = Uses(), []
    cuda.current = Stream("one")

    def other():
        with uses:
            seen.append("other")

    thread = threading.Thread(target=other)
    with uses:
        thread.start()
        thread.join(0.05)
        seen.append("first")
    thread.join()
    assert seen == ["first", "other"]


def test_what_is_kept_goes_with_its_group_and_no_other_group_finds_it():
    kept, group = ByGroup(dict), Group()
    kept.of(group)["answer"] = 1
    kept.of()["answer"] = 2  # without any group
    assert (kept.of(group), kept.of()) == ({"answer": 1}, {"answer": 2})
    del group
    gc.collect()
    assert kept.all() == [{"answer": 2}]
    assert all(kept.of(Group()) == {} for _ in range(100))  # some at the same address


def test_what_is_kept_for_a_destroyed_group_is_dropped_though_a_layer_refers_to_it(monkeypatch):
    kept, alive, gone = ByGroup(dict), Group(), Group()
    kept.of(alive)["answer"], kept.of(gone)["answer"] = 1, 2
    known = {alive: [0], gone: [0]}
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: known[group])
    kept.drop_destroyed()
    assert len(kept.all()) == 2
    del known[gone]
    kept.drop_destroyed()
    assert kept.all() == [{"answer": 1}]


def test_a_process_group_that_was_destroyed_is_noticed(ranks):
    assert ranks.run(jobs.made_and_destroyed) == [(True, False)] * ranks.size


def test_the_buffers_of_a_group_go_with_it(monkeypatch):
    class Box:
        def __init__(self, nbytes, group=None):
            self.nbytes, self.shared = nbytes, self
            self.memory = torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(symmetric, "_held", ByGroup(symmetric._Held))
    one, two = Group(), Group()
    box = symmetric._roomy(Box, 1, one)
    assert symmetric._roomy(Box, 1, one) is box
    assert symmetric._roomy(Box, 1, two) is not box
    assert symmetric.held_bytes() == 2 << 24
    assert symmetric.uses(one) is not symmetric.uses(two)
    del one
    gc.collect()
    assert symmetric.held_bytes() == 1 << 24
    assert groups.itself(two) is two


@pytest.mark.gpus(2)
@pytest.mark.parametrize("how", ["exchange", "two_shot", "auto", "collective"])
def test_layers_of_one_group_in_two_streams_give_what_they_give_in_one(ranks, how):
    assert ranks.run(jobs.in_two_streams, how, timeout=300) == [0] * ranks.size


@pytest.mark.gpus(2)
@pytest.mark.parametrize("how", ["exchange", "two_shot"])
def test_two_streams_inside_one_capture_give_what_they_give_in_one(ranks, how):
    assert ranks.run(jobs.captured_in_two_streams, how, timeout=120) == [0] * ranks.size


@pytest.mark.gpus(2)
@pytest.mark.parametrize("kept_alive", [False, True])
def test_groups_that_come_and_go_do_not_use_up_memory(ranks, kept_alive):
    for held, used in ranks.run(jobs.groups_that_come_and_go, 8, kept_alive, timeout=300):
        assert max(held) == held[0]  # as much as the first group has
        assert used[-1] - used[1] < held[0] / 2  # of the device, in bytes


def test_buffers_of_a_group_that_ends_inside_a_capture_are_freed_after_it(monkeypatch):
    class Buffer:
        """Stands for a mailbox."""

    buffer = Buffer()
    freed = weakref.ref(buffer)
    held = symmetric._Held(made={Buffer: [buffer]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    del buffer, held
    gc.collect()
    assert freed() is not None
    symmetric._to_free.clear()  # as the next buffers' maker does
    assert freed() is None
