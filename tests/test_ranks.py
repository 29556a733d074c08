"""The pool of ranks: what a run returns, and what is refused."""

import contextlib
import os
import socket
import tempfile
import threading

import pytest
import torch

from blockshock.distributed import RankFailure, Ranks, open_ranks, rank_main, wire
from blockshock.distributed.ranks import device
from tests.rank_jobs import (
    about,
    add_up,
    answer_or_sleep,
    echo,
    fail_on,
    failure_of,
    is_gone,
    pid,
    pool_directories,
    return_unpicklable,
    use_ranks,
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


def test_results_come_in_rank_order(pool):
    assert [entry["rank"] for entry in pool.run(about)] == [0, 1]
    assert pool.run(add_up, 1.0, step=2.0) == [4.0, 4.0]


def test_ranks_stay_between_runs(pool):
    assert pool.run(pid) == pool.run(pid)


def test_a_rank_knows_its_device_and_shares_the_cores(pool):
    for entry in pool.run(about):
        assert entry["device"] == "cpu"
        assert entry["backend"] == "gloo"
        assert entry["threads"] == max(1, rank_main.cpus() // 2)
        assert entry["multicast"] == "0"
    with pytest.raises(RuntimeError, match="in a rank only"):
        device()


def test_ranks_start_with_the_parents_present_environment(monkeypatch):
    monkeypatch.setenv("BLOCKSHOCK_TEST_MARK", "set late")
    with Ranks(1, device="cpu") as ranks:
        assert ranks.run(about)[0]["marked"] == "set late"


def test_what_no_socket_holds_at_once_passes_both_ways(pool):
    x = torch.arange(2_500_000, dtype=torch.float32)  # 10 MB there, 100 MB back from each
    first, second = pool.run(echo, x, times=10)
    assert torch.equal(first, x.repeat(10))
    assert torch.equal(second, (x + 1).repeat(10))


def test_frames_survive_any_cut():
    sent = wire.frame(wire.READY) + wire.frame(wire.RESULT, b"abc")
    for cut in range(1, len(sent)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            inbox, got = wire.Inbox(ours), []
            ours.setblocking(False)
            for piece in (sent[:cut], sent[cut:]):
                theirs.sendall(piece)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        got.append(inbox.take())
            theirs.close()
            with pytest.raises(EOFError):
                inbox.take()
        assert [g for g in got if g] == [(wire.READY, b""), (wire.RESULT, b"abc")]


def test_what_cannot_be_pickled_is_named(pool):
    before = pool.run(pid)
    with pytest.raises(ValueError, match=r"the function .*<lambda> cannot be pickled.*top level"):
        pool.run(lambda: 0)
    with pytest.raises(ValueError, match="argument 1 of fail_on cannot be pickled"):
        pool.run(fail_on, 0, threading.Lock())
    with pytest.raises(ValueError, match="argument step of add_up cannot be pickled"):
        pool.run(add_up, 0, step=lambda: 0)
    assert pool.run(pid) == before  # the ranks took no harm
    failure = failure_of(pool, return_unpicklable)
    assert "the result cannot be pickled" in str(failure)
    with pytest.raises(ValueError, match=r"on meta cannot leave its process; send `\.cpu\(\)`"):
        pool.run(echo, torch.empty(1, device="meta"))


def test_wrong_use_is_refused(pool):
    for timeout in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            pool.run(pid, timeout=timeout)
    with pytest.raises(ValueError, match="at least one rank"):
        Ranks(0, device="cpu")
    with pytest.raises(ValueError, match="valid: cuda, cpu"):
        open_ranks(2, "gpu")
    assert "a rank cannot run ranks" in str(failure_of(pool, use_ranks))
    closed = Ranks(1, device="cpu")
    closed.close()
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.run(pid)


def test_one_run_at_a_time(pool):
    caught = []

    def hang():
        with pytest.raises(RankFailure) as failure:
            pool.run(answer_or_sleep, 0, timeout=1)
        caught.append(failure.value)

    pool.run(pid)
    thread = threading.Thread(target=hang)
    thread.start()
    assert wait_until(pool._busy.locked)
    with pytest.raises(RuntimeError, match="already"):
        pool.run(pid)
    thread.join()
    assert caught[0].kind == "hung"


@pytest.mark.parametrize("found", [0, 1])
def test_missing_gpus_are_told_before_anything_starts(monkeypatch, pool, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    before = pool_directories()
    with pytest.raises(ValueError, match=f"2 ranks on cuda need 2 GPUs, one each; found {found}"):
        open_ranks(2, "cuda")
    assert pool_directories() == before


def test_a_forgotten_pool_ends_with_its_last_reference(pool):
    before = pool_directories()
    pool = Ranks(2, device="cpu")
    pids = pool.run(pid)
    del pool
    assert all(is_gone(process) for process in pids)
    assert pool_directories() == before
