"""What ends a rank of a torchrun job when the job can no longer go on.

No parent watches these ranks, so each has a thread that does. It looks at the clock, and at one key
in the launcher's store: the rank that gives the job up writes the cause there, and all end with it.
In a run that takes long each thread also leaves a sign of life in the store now and then, with what
its rank is at. So the others can name a rank that stands still, as one that a signal has stopped.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from blockshock.distributed import here
from blockshock.distributed.failure import RankFailure, Report
from blockshock.distributed.waiting import State, Waiting, at, in_words

GRACE_SECONDS = 10.0  # after a failure: for all ranks to come to the gathering
TICK_SECONDS = 0.5  # how often it looks around
BEAT_SECONDS = 2.0  # between two signs of life, in runs that take longer than that
SILENT_SECONDS = 10.0  # without one: the rank stands still, or is in none of our runs


class Job:
    """What this process has of the job as a whole."""

    side: dist.ProcessGroup | None = None  # gloo, for results; the default group may be NCCL
    store: dist.Store | None = None  # a connection of its own: the group's may be waiting


class Watch:
    """A thread that ends this process when the run it watches can no longer end by itself."""

    def __init__(
        self,
        rank: int,
        size: int,
        limit: float,
        what: str,
        tell: Callable[[str], None] | None = None,
    ):
        self._tell = tell
        self._rank, self._size, self._limit, self._what = rank, size, limit, what
        self._who = f"rank {rank} of {size}"
        self._runner = threading.get_ident()
        self._done = threading.Event()
        self._mine: Report | None = None
        self._thread = threading.Thread(target=self._patrol, daemon=True)

    def __enter__(self) -> Watch:
        now = time.monotonic()
        self._deadline, self._next_beat = now + self._limit, now + BEAT_SECONDS
        self._waiting = Waiting(self._limit, self._tell)
        self._signs = dict.fromkeys(range(self._size), ("0 0 ", now))  # the last, and when it came
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def arrived(self, mine: Report) -> None:
        """The function has ended here. What is left is to wait for the other ranks."""
        # The rank that is stuck speaks first; those that only wait for it have longer.
        self._deadline += GRACE_SECONDS
        if mine.kind != "answered":
            self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)
        self._mine = mine

    def _patrol(self) -> None:
        while not self._done.wait(TICK_SECONDS):
            told = self._told()
            if told:
                self._end(f"{told}\n\n--- {self._who} ends with the job. {self._stand()}")
            self._beat()
            self._waiting.look(self._states)
            if time.monotonic() > self._deadline:
                self._end(self._cause(), tell=True)

    def _told(self) -> str:
        """Why another rank gave the job up, if one did."""
        if Job.store is None:
            return ""
        try:
            return Job.store.get("doomed").decode() if Job.store.check(["doomed"]) else ""
        except RuntimeError as error:
            return f"the launcher's store is gone: {error}"

    def _beat(self) -> None:
        """Leaves a sign of life, and notices the signs of the others."""
        now = time.monotonic()
        if Job.store is None or now < self._next_beat:
            return
        self._next_beat = now + BEAT_SECONDS
        note, seconds = (f"the end of {self._what}", 0.0) if self._mine else here.last_note()
        with contextlib.suppress(RuntimeError):  # the store is gone: `_told` notices it
            Job.store.set(f"sign {self._rank}", f"{now} {seconds:.0f} {note}")
            for rank, (last, _) in self._signs.items():
                sign = f"sign {rank}"
                found = Job.store.get(sign).decode() if Job.store.check([sign]) else ""
                if found != last:
                    self._signs[rank] = (found, now)

    def _states(self) -> list[State]:
        """Of each rank."""
        states = []
        for rank, (sign, when) in self._signs.items():
            _, seconds, note = sign.split(" ", 2)
            silent = time.monotonic() - when
            if silent > SILENT_SECONDS:
                states.append((rank, at(note, silent=silent), 0.0))
            else:
                states.append((rank, at(note), float(seconds)))
        return states

    def _cause(self) -> str:
        now = time.monotonic()
        still = [rank for rank, (_, when) in self._signs.items() if now - when > SILENT_SECONDS]
        if still and Job.store is not None:
            told = in_words(state for state in self._states() if state[0] in still)
            return f"{told}, in {self._what}; the limit is {self._limit:g} s\n{self._stand()}"
        if self._mine is None:
            note, _ = here.last_note()
            doing = f"{self._what}, while: {note}" if note else self._what
            head = f"{self._who} did not answer within {self._limit:g} s, in {doing}"
            return f"{head}\n{self._stand()}"
        if self._mine.kind == "answered":
            return f"{self._who} has finished {self._what} and waits in vain for the others"
        return f"{self._mine.words(self._size)}, in {self._what}\n{self._mine.error['traceback']}"

    def _stand(self) -> str:
        frames = traceback.extract_stack(sys._current_frames().get(self._runner))
        callers = [i for i, frame in enumerate(frames) if frame.filename in here.CALLERS]
        stack = "".join(traceback.format_list(frames[max(callers, default=-1) + 1 :]))
        return f"It stands here:\n{stack.rstrip()}"

    def _end(self, text: str, *, tell: bool = False) -> None:
        """Ends the process; the launcher's report shows the text even where output is captured.

        With `tell` all ranks end with it. They have a moment to say where they stand, before the
        launcher ends what is left.
        """
        try:
            raise RankFailure(text, kind="hung", rank=self._rank)
        except RankFailure as failure:
            with contextlib.suppress(OSError):
                get_error_handler().record_exception(failure)
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}\n".encode())
        if tell and Job.store is not None:
            with contextlib.suppress(RuntimeError):  # the store is gone as well
                Job.store.compare_set("doomed", "", text)
                time.sleep(2 * TICK_SECONDS)
        os._exit(1)
