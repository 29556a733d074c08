"""One rank of a pool: joins the process group, then calls what the parent sends, until told to go.

A rank outlives an error in the function it was given: it reports the error and waits. Its
connections stay open, so its peers do not fail with "connection closed by peer" while the parent
is still hearing about the cause.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import multiprocessing.connection
import os
import pickle
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from blockshock.distributed import here, wire

# A rank that holds the interpreter for ever cannot notice that its parent is gone. It ends this
# many seconds after the deadline at which its parent would have killed it.
LAST_RESORT_SECONDS = 60.0


@dataclass(frozen=True)
class Setup:
    """What a rank is told when it is started."""

    rank: int
    size: int
    device: str  # "cuda" or "cpu"
    directory: str  # private to the pool: FileStore, notes, stacks, temporary files
    litter: tuple[str, ...]  # what else is to be removed when the parent was killed
    environ: dict[str, str]


def main(setup: Setup, sock: socket.socket) -> None:
    """The whole life of a rank."""
    os.setpgrp()  # what the rank starts dies with it: the parent kills the group
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_follow_parent, args=(setup, sock), daemon=True).start()
    inbox = wire.Inbox(sock)
    if _answer(sock, lambda: _start(setup, sock)):
        while (job := _next(inbox)) is not None:
            _answer(sock, lambda: _call(*job))
        dist.destroy_process_group()


def _start(setup: Setup, sock: socket.socket) -> None:
    """Settles into the environment, then joins the process group."""
    _set_environment(setup)
    directory = Path(setup.directory)
    stacks = _kept_open(directory / f"stacks-{setup.rank}")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    with (directory / f"note-{setup.rank}").open("r+b") as file:
        board = mmap.mmap(file.fileno(), here.NOTE_BYTES)
    wire.send(sock, wire.READY)  # from here on it can be asked for its stack
    cuda = setup.device == "cuda"
    here.enter(setup.rank, torch.device("cuda", setup.rank) if cuda else torch.device("cpu"), board)
    here.note("joining the process group")
    if cuda:
        torch.cuda.set_device(setup.rank)
    else:
        torch.set_num_threads(max(1, cpus() // setup.size))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(str(directory / "store"), setup.size),
        rank=setup.rank,
        world_size=setup.size,
        timeout=here.GROUP_TIMEOUT,
        device_id=here.device() if cuda else None,
    )


def _set_environment(setup: Setup) -> None:
    """The parent's environment, with temporary files in the pool's directory."""
    os.environ.clear()  # the server from which ranks fork may be older than the parent's settings
    os.environ.update(setup.environ)
    here.without_multicast(os.environ)
    # A rank may be killed at any moment. What it leaves among temporary files (symmetric memory's
    # sockets, half-written sources) goes with the pool; compiled kernels stay for the next one.
    tempfile.tempdir = None
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    os.environ["TMPDIR"] = tempfile.tempdir = setup.directory
    # All ranks are on this host: gloo needs not guess an interface from the host's name.
    loopback = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback.pop())
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(line_buffering=True)  # a killed rank loses nothing it printed


def _kept_open(path: Path) -> Any:
    """A file for faulthandler, which keeps it (and so its descriptor) as long as the rank lives."""
    return path.open("w")


def cpus() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _next(inbox: wire.Inbox) -> tuple[bytes, list[str], float] | None:
    """The next job (pickled call, sys.path, seconds), or None when the rank is to leave."""
    with contextlib.suppress(EOFError):
        while True:
            got = inbox.take()
            if got is not None:
                return None if got[0] == wire.LEAVE else pickle.loads(got[1])
    return None


def _call(call: bytes, path: list[str], limit: float) -> Any:
    """Calls the function of a job. Its module is found where the parent would find it."""
    here.note("reading the call")
    sys.path[:] = path
    fn, args, kwargs = pickle.loads(call)
    here.note("")
    faulthandler.dump_traceback_later(limit + LAST_RESORT_SECONDS, exit=True)
    try:
        result = fn(*args, **kwargs)
        here.note("")
        return result
    finally:
        faulthandler.cancel_dump_traceback_later()


def _answer(sock: socket.socket, work: Callable[[], Any]) -> bool:
    """Does the work and sends its result or its failure. True when it succeeded."""
    try:
        tag, payload = wire.RESULT, wire.dumps(work(), "the result")
    except BaseException as error:
        tag, payload = wire.FAILED, pickle.dumps(here.describe(error))
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
        sys.stdout.flush()
    with contextlib.suppress(ConnectionError):
        wire.send(sock, tag, payload)
    return tag == wire.RESULT


def _follow_parent(setup: Setup, sock: socket.socket) -> None:
    """Ends the rank when the parent is gone, or holds its end of the socket no more.

    The files are removed here: nobody else is left to do it.
    """
    sentinel = multiprocessing.parent_process().sentinel
    watch = select.poll()
    watch.register(sentinel, select.POLLIN)
    watch.register(sock, 0)  # hang-up is always reported
    watch.poll()
    orphaned = multiprocessing.connection.wait([sentinel], timeout=1.0)
    shutil.rmtree(setup.directory, ignore_errors=True)
    for path in setup.litter if orphaned else ():
        shutil.rmtree(path, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
