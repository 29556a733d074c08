"""Ranks: a function is run in several processes at once, one per GPU, and they fail as one.

    with Ranks(2, device="cpu") as ranks:
        sums = ranks.run(add_up, 3)        # add_up(3) in both: [result of rank 0, of rank 1]

The processes are started by the first run and stay for the session, so a run costs its function and
about a millisecond. They meet through a FileStore in a private temporary directory: no port is
taken. After a failure every rank is killed, and the next run has new ones: an abandoned collective
cannot be repaired, and aborting NCCL can itself hang.

Under torchrun the ranks are there already: `open_ranks` attaches to them, with the same interface.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from blockshock.distributed import call, here
from blockshock.distributed.attached import AttachedRanks, launched
from blockshock.distributed.failure import RankFailure
from blockshock.distributed.here import device, note
from blockshock.distributed.member import CONTEXT
from blockshock.distributed.team import Team

__all__ = ["AttachedRanks", "RankFailure", "Ranks", "device", "launched", "note", "open_ranks"]

DEVICES = ("cuda", "cpu")


class Ranks:
    """A pool of `size` ranks in one process group: NCCL and a GPU each, or gloo on CPU.

    The ranks have the parent's environment as it is when they start, and its `sys.path` as it is
    when something is run. Their temporary files go with them.

    Args:
        size: how many ranks. device: "cuda" or "cpu".
        timeout: seconds that a run may take, all ranks together, unless it says otherwise. Starting
            the processes does not count.
        tell: takes a line, now and then, that says what a long run waits for.

    Raises:
        ValueError: an unknown device, a size below 1, a timeout not above 0, or fewer GPUs than
            ranks.
    """

    def __init__(
        self,
        size: int,
        *,
        device: str,
        timeout: float = 120.0,
        tell: Callable[[str], None] | None = None,
    ):
        _check_device(device)
        if size < 1:
            raise ValueError(f"size={size}: a pool has at least one rank")
        call.check_timeout(timeout)
        if device == "cuda":
            _check_gpus(size)
        self.size, self.device, self.timeout, self._tell = size, device, timeout, tell
        self._team: Team | None = None
        self._closed = False
        self._busy = threading.Lock()

    def run(
        self, fn: Callable[..., Any], *args: Any, timeout: float | None = None, **kwargs: Any
    ) -> list[Any]:
        """Calls `fn(*args, **kwargs)` in every rank; the results, in rank order.

        `fn` comes from the top level of a module, which the ranks import. Arguments and results are
        pickled: tensors on CPU, plain data. `timeout` in seconds replaces the pool's.

        Raises:
            RankFailure: a rank raised, exited, was killed, or did not answer in time. All ranks are
                gone then; the next run gets new ones.
            ValueError: `fn` or an argument cannot be pickled, or the timeout is not above 0.
            RuntimeError: the pool is closed, is running something already, or is used in a rank.
        """
        limit = self.timeout if timeout is None else timeout
        job = call.pack(fn, args, kwargs, limit)
        if here.rank() is not None:
            raise RuntimeError("a rank cannot run ranks: call run() in the parent process")
        if self._closed:
            raise RuntimeError("this pool of ranks is closed; open a new one")
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this pool is running something already; one run at a time")
        try:
            if self._team is None:
                # The server from which ranks fork imports torch once: a new pool takes 0.1 s then.
                CONTEXT.set_forkserver_preload(
                    ["torch", "torch.distributed", "blockshock.distributed.rank_main"]
                )
                self._team = Team(self.size, self.device, self._tell)
            answers = self._team.ask(job, limit, call.name(fn))
        except BaseException:
            self._drop()
            raise
        finally:
            self._busy.release()
        return [call.unpack_result(answer) for answer in answers]

    def close(self) -> None:
        """Lets the ranks leave. The pool runs nothing more; closing again does nothing."""
        self._closed = True
        team, self._team = self._team, None
        if team is not None:
            team.leave()

    def _drop(self) -> None:
        team, self._team = self._team, None
        if team is not None:
            team.kill()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_team"):
            self._drop()


def open_ranks(
    size: int | None,
    device: str,
    *,
    timeout: float = 120.0,
    tell: Callable[[str], None] | None = None,
) -> Ranks | AttachedRanks:
    """The ranks that torchrun started, when it did; else a pool of `size` ranks.

    Args:
        size: how many. None: all that torchrun started; in a pool every GPU, or 2 on CPU.
        device: "cuda" or "cpu". timeout, tell: as in `Ranks`.

    Raises:
        ValueError: `size` is not what torchrun started, or what `Ranks` refuses.
    """
    _check_device(device)
    if launched():
        return AttachedRanks(size, device=device, timeout=timeout, tell=tell)
    if size is None:
        size = max(1, torch.cuda.device_count()) if device == "cuda" else 2
    return Ranks(size, device=device, timeout=timeout, tell=tell)


def _check_device(device: str) -> None:
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is unknown; valid: {', '.join(DEVICES)}")


def _check_gpus(size: int) -> None:
    # Counted through NVML, which makes no CUDA context. (Where NVML is missing torch starts CUDA to
    # count. The ranks would not mind: the server from which they fork is a program of its own.)
    found = torch.cuda.device_count()
    if found < size:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        raise ValueError(
            f"{size} ranks on cuda need {size} GPUs, one each; found {found}{shown}. "
            'Use fewer ranks, or device="cpu"'
        )
