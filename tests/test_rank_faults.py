"""Every way in which a rank can fail ends in one clear message, and the next run works."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from blockshock.distributed import RankFailure, Ranks, here, note, noting, waiting
from tests.rank_jobs import (
    FAILURES,
    answer_or_sleep,
    fail_on,
    failure_of,
    is_gone,
    leave_things,
    pid,
    pool_directories,
    raise_differently,
    raise_everywhere,
    wait_until,
)

pytestmark = pytest.mark.skipif(
    "TORCHELASTIC_RUN_ID" in os.environ, reason="under torchrun there is no pool to test"
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Two ranks, whose temporary files stand apart from everybody else's."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("ranks"))
    with Ranks(2, device="cpu", timeout=30) as ranks:
        yield ranks
    assert pool_directories() == []
    tempfile.tempdir = before


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("raise", "raised", "rank 1 of 2 raised ValueError: N=1000 must be a multiple of 64"),
        ("sys.exit", "exited", "rank 1 of 2 exited with code 3"),
        ("sys.exit text", "exited", "rank 1 of 2 exited with code 1"),
        ("os._exit", "exited", "rank 1 of 2 exited with code 3"),
        ("kill", "exited", "rank 1 of 2 was killed by SIGKILL (out of memory?)"),
        ("segfault", "exited", "rank 1 of 2 was killed by SIGSEGV"),
    ],
)
def test_the_cause_is_told_and_not_its_echo(pool, how, kind, text):
    pool.run(pid)
    start = time.monotonic()
    failure = failure_of(pool, fail_on, 1, how)
    assert time.monotonic() - start < 10  # at once, and not when the 30 s of the run are over
    assert (failure.kind, failure.rank) == (kind, 1)
    assert str(failure).startswith(text)
    assert failure.note == f"about to fail: {how}"
    assert f"in fail_on, while: about to fail: {how}" in str(failure)


def test_a_traceback_names_the_line_that_raised(pool):
    failure = failure_of(pool, fail_on, 0, "raise")
    assert failure.exc_type == "ValueError"
    assert "raise ValueError(text)" in failure.detail
    assert "rank_main" not in failure.detail
    # and where the other rank waited
    assert "rank 1 of 2 stands here" in failure.detail
    assert "in barrier" in failure.detail


def test_a_crash_shows_the_python_stack(pool):
    failure = failure_of(pool, fail_on, 0, "segfault")
    assert "Segmentation fault" in failure.detail
    assert "in read_null" in failure.detail


@pytest.mark.parametrize("how", ["sleep", "receive", "stop", "hold"])
def test_a_hang_ends_at_the_deadline_and_shows_where(pool, how):
    failure = failure_of(pool, fail_on, 0, how, timeout=1.5)
    assert failure.kind == "hung"
    blamed = "ranks 0, 1 of 2 did not answer within 1.5 s, in fail_on"
    if how == "stop":
        blamed = "rank 0 of 2 was stopped by a signal (SIGSTOP) and did not answer within 1.5 s"
    assert str(failure).startswith(blamed)
    assert failure.note == f"about to fail: {how}"
    assert "in barrier" in failure.detail  # rank 1
    if how != "stop":  # a stopped process cannot say
        assert f"in {FAILURES[how].__name__}" in failure.detail


def test_a_run_that_takes_long_says_what_it_waits_for(monkeypatch, pool):
    monkeypatch.setattr(waiting, "FIRST_SECONDS", 0.4)
    monkeypatch.setattr(waiting, "EVERY_SECONDS", 0.4)
    lines = []
    with Ranks(2, device="cpu", timeout=30, tell=lines.append) as ranks:
        ranks.run(pid)
        lines.clear()
        with pytest.raises(RankFailure, match="rank 1 of 2 was stopped by a signal"):
            ranks.run(fail_on, 1, "stop", timeout=1)
        first, second = lines
    assert first.startswith("still waiting: rank 0 at the start; rank 1 stopped by a signal (SIGS")
    assert first.endswith("at: about to fail: stop; 0 s, ends at 1 s")
    assert second.endswith("; 1 s, ends at 1 s")


def test_a_part_of_the_work_stands_before_the_note_and_an_error_leaves_it_there():
    try:
        note("checking")
        with noting("the truth"):
            assert here.last_note()[0] == "the truth, checking"
        text, seconds = here.last_note()
        assert text == "checking"
        assert 0 <= seconds < 10
        with pytest.raises(KeyError), noting("the truth"):
            raise KeyError
        assert here.last_note()[0] == "the truth, checking"
    finally:
        note("")


def test_ranks_that_are_at_the_same_are_told_together():
    states = [(0, waiting.at("a"), 7.0), (1, waiting.at("b"), 0.2), (2, waiting.at("a"), 8.0)]
    assert waiting.in_words(states) == "ranks 0, 2 at: a (8 s); rank 1 at: b"
    assert waiting.at("x", silent=12.3).startswith("without a sign of life for 12 s")


def test_one_deadline_holds_for_all_ranks(pool):
    pool.run(pid)
    start = time.monotonic()
    with pytest.raises(RankFailure, match="ranks 0, 1 of 2 did not answer"):
        pool.run(fail_on, 0, "sleep", timeout=1.5)
    assert 1.5 <= time.monotonic() - start < 2.9  # not 1.5 s for each


def test_only_silent_ranks_are_blamed(pool):
    failure = failure_of(pool, answer_or_sleep, 1, timeout=0.5)
    assert str(failure).startswith("rank 1 of 2 did not answer within 0.5 s")
    assert failure.note == "sleeping"
    assert "rank 0 of 2 had answered" in failure.detail


def test_an_error_on_every_rank_is_told_once(pool):
    failure = failure_of(pool, raise_everywhere, "3 ranks: an even number is needed")
    assert str(failure).startswith("ValueError: 3 ranks: an even number is needed\n")
    assert "on every one of 2 ranks" in str(failure)
    assert str(failure).count("Traceback") == 1
    assert failure.exc_type == "ValueError"


def test_different_errors_are_all_told(pool):
    failure = failure_of(pool, raise_differently)
    assert failure.exc_type == "KeyError"
    assert "key of rank 0" in str(failure)
    assert "key of rank 1" in str(failure)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB"),
        (RuntimeError, "NCCL error: Cuda failure 2 'out of memory'"),
    ],
)
def test_running_out_of_memory_has_one_name(pool, kind, text):
    failure = failure_of(pool, fail_on, 0, "out of memory", kind, text)
    assert failure.exc_type == "OutOfMemoryError"


def test_a_death_between_runs_is_told_by_the_next(pool):
    (first, _) = pool.run(pid)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(RankFailure, match="rank 0 of 2 was killed by SIGKILL"):
        pool.run(pid)
    assert len(pool.run(pid)) == 2


def test_ranks_leave_interrupts_to_their_parent(pool):
    before = pool.run(pid)
    for process in before:
        os.kill(process, signal.SIGINT)
    assert pool.run(pid) == before


def test_ranks_that_cannot_start_say_why(monkeypatch, pool):
    before = pool_directories()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    with Ranks(2, device="cpu") as ranks, pytest.raises(RankFailure, match="none0") as caught:
        ranks.run(pid)
    assert "in the start of the ranks, while: joining the process group" in str(caught.value)
    assert pool_directories() == before


def test_what_a_rank_leaves_is_removed(pool):
    failure = failure_of(pool, leave_things, timeout=0.5)
    child, path = failure.note.split()
    assert wait_until(lambda: is_gone(child))
    assert not Path(path).exists()
