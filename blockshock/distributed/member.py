"""One rank as its parent sees it: a process, a socket that never blocks, and two small files."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import time
from pathlib import Path

from blockshock.distributed import here, rank_main, wire
from blockshock.distributed.failure import Report, trim_stack

CONTEXT = multiprocessing.get_context("forkserver")


class Member:
    """A rank that is made but not started."""

    def __init__(self, setup: rank_main.Setup):
        self.rank = setup.rank
        self._note = Path(setup.directory, f"note-{self.rank}")
        self.stacks = Path(setup.directory, f"stacks-{self.rank}")
        # Its bytes are written here, so that a full disk is an error now and not a SIGBUS there.
        start = here.on_board("", time.monotonic())
        self._note.write_bytes(start.ljust(here.NOTE_BYTES, b"\0"))
        self.sock, self._theirs = socket.socketpair()
        self.sock.setblocking(False)
        self.process = CONTEXT.Process(
            target=rank_main.main, args=(setup, self._theirs), name=f"rank {self.rank}"
        )
        self._inbox = wire.Inbox(self.sock)
        self.outbox = memoryview(b"")
        self.ready = False  # its signal handlers are in place
        self.gone = False  # its end of the socket is closed, or its process has ended
        self.answer: tuple[bytes, bytearray] | None = None

    def start(self) -> None:
        """Starts the process."""
        try:
            self.process.start()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(
                "the server from which ranks fork ended at once; what it printed says why"
            ) from error
        finally:
            self._theirs.close()

    @property
    def failed(self) -> bool:
        """Whether it reported a failure, or is gone."""
        return self.gone or (self.answer is not None and self.answer[0] == wire.FAILED)

    @property
    def silent(self) -> bool:
        """Whether it is there and has not answered."""
        return self.answer is None and not self.gone

    @property
    def stopped(self) -> bool:
        """Whether a signal has stopped its process, as far as the system says (Linux)."""
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] in "Tt"
        return False

    def read(self) -> bool:
        """Takes something of what has arrived; False when there was nothing."""
        try:
            got = self._inbox.take()
        except BlockingIOError:
            return False
        except EOFError:
            self.gone = True
            return False
        if got is not None and got[0] == wire.READY:
            self.ready = True
        elif got is not None:
            self.answer = got
        return True

    def bury(self) -> None:
        """The process has ended: reads what it left in its socket."""
        while self.read():
            pass
        self.gone = True

    def write(self) -> None:
        """Sends what the socket takes of the outbox."""
        with contextlib.suppress(BlockingIOError):
            try:
                self.outbox = self.outbox[self.sock.send(self.outbox) :]
            except ConnectionError:
                self.outbox = memoryview(b"")  # reading notices the end

    def signal(self, number: int) -> None:
        """Sends the process a signal."""
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kills the rank and whatever it has started."""
        if self.process.pid is None:  # never started
            return
        self.signal(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Gives up socket and process object."""
        self.sock.close()
        self._theirs.close()
        with contextlib.suppress(ValueError):  # it could not be killed
            self.process.close()

    def note(self) -> tuple[str, float]:
        """What it said last, and how many seconds ago."""
        return here.from_board(self._note.read_bytes())

    def report(self, code: int | None, note: str) -> Report:
        """What became of it. `code` and `note`: its exit code and note before it was killed."""
        report = Report(self.rank, code=code, note=note, alive=self.process.is_alive())
        if self.answer is not None and self.answer[0] == wire.FAILED:
            report.told(pickle.loads(self.answer[1]))
        elif self.gone:
            report.kind = "exited"
            if not self.ready:
                report.stack = (
                    "It ended before it was ready; what it printed says why. A script opens ranks "
                    'under `if __name__ == "__main__":` only, because each rank imports it'
                )
                return report
        elif self.answer is not None:
            report.kind = "answered"
        if report.kind in ("hung", "exited") and self.stacks.exists():
            report.stack = trim_stack(self.stacks.read_text(errors="replace"))
        return report
