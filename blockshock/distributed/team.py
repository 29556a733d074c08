"""The ranks of a pool from their start to their first failure, as their parent sees them.

Every socket and every process sentinel is watched at once, under one deadline for all ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.util
import os
import selectors
import shutil
import signal
import tempfile
import time
from collections.abc import Callable

from blockshock.distributed import wire
from blockshock.distributed.failure import RankFailure, compose
from blockshock.distributed.member import Member
from blockshock.distributed.rank_main import Setup
from blockshock.distributed.waiting import State, Waiting, at

START_SECONDS = 300.0  # to import torch from a cold disk and join NCCL; no part of a run's limit
GRACE_SECONDS = 0.3  # after the first failure: for the other ranks' own reports
STACK_SECONDS = 0.5  # for silent ranks to write their stacks
KILL_SECONDS = 10.0  # for killed processes to be gone; inside the GPU driver it can take long
LEAVE_SECONDS = 5.0  # for all ranks to leave in order


class Team:
    """`size` running ranks that have joined one process group.

    tell: takes a line, now and then, that says what a long run waits for.

    Raises:
        RankFailure: a rank did not start.
    """

    def __init__(self, size: int, device: str, tell: Callable[[str], None] | None = None):
        self._tell = tell
        self._owner = os.getpid()
        self._directory = tempfile.mkdtemp(prefix="blockshock-ranks-")
        self.members: list[Member] = []
        atexit.register(self.kill)
        # multiprocessing keeps the address of its fork server there
        litter = (multiprocessing.util.get_temp_dir(),)
        try:
            for rank in range(size):
                setup = Setup(rank, size, device, self._directory, litter, dict(os.environ))
                self.members.append(Member(setup))
                self.members[-1].start()
            self._collect(START_SECONDS, "the start of the ranks")
        except BaseException:
            self.kill()
            raise

    def ask(self, job: bytes, limit: float, call: str) -> list[bytearray]:
        """Sends every rank the same job; what they answered, in rank order.

        Args:
            job: pickled, as rank_main reads it. limit: seconds for all ranks together.
            call: the function's name, for the message.

        Raises:
            RankFailure: a rank failed. The team has ended then.
        """
        frame = memoryview(wire.frame(wire.JOB, job))
        for member in self.members:
            member.outbox = frame
        return self._collect(limit, call)

    def _collect(self, limit: float, call: str) -> list[bytearray]:
        """Serves the ranks until each has answered, or one has failed."""
        failed = self._serve(limit)
        if failed or any(member.answer is None for member in self.members):
            raise self._failure(failed, limit, call)
        answers = [member.answer[1] for member in self.members]
        for member in self.members:
            member.answer = None
        return answers

    def _serve(self, limit: float) -> list[Member]:
        """Moves bytes until no rank is silent, or the limit, or shortly after a failure.

        Returns the members that failed, in the order in which it was noticed.
        """
        failed: list[Member] = []
        deadline, waiting = time.monotonic() + limit, Waiting(limit, self._tell)
        with selectors.DefaultSelector() as selector:
            for member in self.members:
                selector.register(member.sock, _events(member), member)
                selector.register(member.process.sentinel, selectors.EVENT_READ, member)
            while any(member.silent for member in self.members):
                until = min(deadline, waiting.next)
                ready = selector.select(max(0.0, until - time.monotonic()))
                waiting.look(self._states)
                if not ready and time.monotonic() >= deadline:
                    break
                for key, events in ready:
                    member = key.data
                    if member.gone:  # noticed through its other descriptor
                        continue
                    if key.fileobj is not member.sock:
                        member.bury()
                    elif events & selectors.EVENT_READ:
                        member.read()
                    else:
                        member.write()
                    if member.gone:
                        selector.unregister(member.sock)
                        selector.unregister(member.process.sentinel)
                    else:
                        selector.modify(member.sock, _events(member), member)
                    if member.failed and member not in failed:
                        failed.append(member)
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return failed

    def _states(self) -> list[State]:
        """Of each silent rank."""
        notes = [(m, *m.note()) for m in self.members if m.silent]
        return [(m.rank, at(note, stopped=m.stopped), seconds) for m, note, seconds in notes]

    def _failure(self, failed: list[Member], limit: float, call: str) -> RankFailure:
        """Asks the silent ranks where they stand, kills all, and says what happened.

        A rank that died goes before ranks that raised, whichever was heard first: their exceptions
        are its echo ("connection closed by peer"). Ranks that raised stay connected, so they have
        no echo. A rank that a signal has stopped goes before those that wait for it.
        """
        silent = [member for member in self.members if member.silent]
        stopped = [member for member in silent if member.stopped]
        notes = [member.note()[0] for member in self.members]  # the signal may wake a rank
        self._ask_for_stacks([member for member in silent if member.ready])
        for member in self.members:
            if member.gone:
                member.process.join(1.0)  # the exit code follows the end of the connection
        codes = [member.process.exitcode for member in self.members]
        self._end()
        reports = [m.report(*end) for m, *end in zip(self.members, codes, notes, strict=True)]
        for member in stopped:
            reports[member.rank].stopped = True
        dead = [member for member in failed if member.answer is None]
        cause = (dead or failed or stopped or silent)[0]
        failure = compose(reports, reports[cause.rank], limit=limit, call=call)
        self.kill()
        return failure

    def _ask_for_stacks(self, members: list[Member]) -> None:
        """Has ranks write where they stand, and waits until their files grow no more."""
        for member in members:
            member.signal(signal.SIGUSR1)
        deadline, sizes = time.monotonic() + STACK_SECONDS, []
        while members and time.monotonic() < deadline:
            time.sleep(0.02)
            before, sizes = sizes, [member.stacks.stat().st_size for member in members]
            if sizes == before and all(sizes):
                break

    def leave(self) -> None:
        """Lets the ranks leave in order, and kills those that do not."""
        deadline = time.monotonic() + LEAVE_SECONDS
        for member in self.members:
            with contextlib.suppress(OSError):
                member.sock.send(wire.frame(wire.LEAVE))
        for member in self.members:
            member.process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Ends every rank now and removes the team's files. May be called again."""
        if os.getpid() != self._owner:  # in a fork of the parent: they are not its ranks
            return
        self._end()
        for member in self.members:
            member.close()
        self.members = []
        shutil.rmtree(self._directory, ignore_errors=True)
        atexit.unregister(self.kill)

    def _end(self) -> None:
        """Kills all, and waits until they are gone."""
        for member in self.members:
            member.kill()
        deadline = time.monotonic() + KILL_SECONDS
        for member in self.members:
            if member.process.pid is not None:
                member.process.join(max(0.0, deadline - time.monotonic()))


def _events(member: Member) -> int:
    return selectors.EVENT_READ | (selectors.EVENT_WRITE if member.outbox else 0)
