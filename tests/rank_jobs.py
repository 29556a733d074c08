"""What the tests of the pool run in ranks, and how they look at what a failure leaves."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from blockshock.distributed import RankFailure, Ranks, note
from blockshock.distributed.ranks import device


def pid():
    return os.getpid()


def add_up(start, *, step=1.0):
    x = torch.tensor([start + step * dist.get_rank()])
    dist.all_reduce(x)
    return x.item()


def echo(x, times=1):
    return (x + dist.get_rank()).repeat(times)


def about():
    return {
        "rank": dist.get_rank(),
        "device": str(device()),
        "backend": dist.get_backend(),
        "threads": torch.get_num_threads(),
        "multicast": os.environ["NCCL_NVLS_ENABLE"],
        "marked": os.environ.get("BLOCKSHOCK_TEST_MARK"),
    }


def fail_on(rank, how, *args):
    """Rank `rank` fails in the way named; the others wait for it in a collective."""
    if dist.get_rank() == rank:
        note(f"about to fail: {how}")
        FAILURES[how](*args)
    dist.barrier()
    return "unharmed"


def say(text):
    raise ValueError(text)


def sleep_forever():
    time.sleep(1000)


def receive_what_nobody_sends():
    dist.recv(torch.empty(1), src=1 - dist.get_rank())


def die_by(number):
    os.kill(os.getpid(), number)
    time.sleep(1000)


def read_null():
    ctypes.string_at(0)


def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(1000)  # a PyDLL call keeps the lock that Python threads need


def run_out(kind, text):
    raise kind(text)


def leave_things():
    """A child process and a temporary file, then no answer."""
    child = subprocess.Popen(["sleep", "1000"])
    _, path = tempfile.mkstemp()
    note(f"{child.pid} {path}")
    time.sleep(1000)


FAILURES = {
    "raise": lambda: say("N=1000 must be a multiple of 64; use 1024"),
    "sys.exit": lambda: sys.exit(3),
    "sys.exit text": lambda: sys.exit("no licence"),
    "os._exit": lambda: os._exit(3),
    "sleep": sleep_forever,
    "receive": receive_what_nobody_sends,
    "kill": lambda: die_by(signal.SIGKILL),
    "stop": lambda: die_by(signal.SIGSTOP),
    "segfault": read_null,
    "hold": hold_the_interpreter,
    "out of memory": run_out,
}


def raise_everywhere(text):
    raise ValueError(text)


def raise_differently():
    raise KeyError(f"key of rank {dist.get_rank()}")


def return_unpicklable():
    return threading.Lock()


def answer_or_sleep(sleeper):
    if dist.get_rank() == sleeper:
        note("sleeping")
        time.sleep(1000)
    return "answered"


def use_ranks():
    Ranks(1, device="cpu").run(pid)


# In the parent


def pool_directories():
    """What pools have in the directory of temporary files now."""
    return sorted(Path(tempfile.gettempdir()).glob("blockshock-ranks-*"))


def is_gone(process):
    """Whether no process with this number runs (a dead one that nobody has reaped counts)."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state == "Z"


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def failure_of(pool, fn, *args, **kwargs):
    """The failure of a run. Afterwards nothing of its ranks is left, and new ones work."""
    before = pool.run(pid)
    with pytest.raises(RankFailure) as caught:
        pool.run(fn, *args, **kwargs)
    assert all(is_gone(process) for process in before)
    assert pool_directories() == []
    assert set(pool.run(pid)).isdisjoint(before)
    return caught.value
