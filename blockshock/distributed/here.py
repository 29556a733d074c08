"""Where this process stands: which rank it is, its device, and what it is doing."""

from __future__ import annotations

import datetime
import mmap
import struct
import time
import traceback
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

NOTE_BYTES = 1024
# The deadline of a run ends a collective that hangs. The process group's own must never come first:
# it would end the innocent ranks with an error that hides the cause.
GROUP_TIMEOUT = datetime.timedelta(hours=24)
# What calls a run's function: no frame of these tells a reader anything.
CALLERS = [str(Path(__file__).with_name(name)) for name in ("rank_main.py", "attached.py")]


class _Here:
    rank: int | None = None  # None outside a rank
    device: torch.device | None = None
    note: str = ""
    since: float = 0.0  # when the note was made, on the clock `time.monotonic`
    board: mmap.mmap | None = None  # both, where the parent finds it whatever befalls the rank


def note(text: str) -> None:
    """Remembers what this rank is doing now; the message of a failure says it.

    Costs about a microsecond and wakes nobody, so it may stand between timed regions. Outside a
    rank it does no harm.
    """
    _Here.note, _Here.since = text, time.monotonic()
    if _Here.board is not None:
        data = on_board(text, _Here.since)
        _Here.board[: len(data)] = data


@contextmanager
def noting(part: str) -> Iterator[None]:
    """Meanwhile the note says which part of the work it is: "part, the note so far".

    Decorates functions as well. An error leaves the note as it is, for the message of the failure.
    """
    whole = _Here.note
    note(f"{part}, {whole}" if whole else part)
    yield
    note(whole)


def last_note() -> tuple[str, float]:
    """The last note of this process, and how many seconds it stands."""
    return _Here.note, time.monotonic() - _Here.since


def on_board(text: str, since: float) -> bytes:
    """A note as it stands on the board."""
    head = struct.pack("d", since)
    return head + text.encode(errors="replace")[: NOTE_BYTES - len(head) - 1] + b"\0"


def from_board(data: bytes) -> tuple[str, float]:
    """The note of another process of this host, and how many seconds it stands."""
    (since,) = struct.unpack_from("d", data)
    text = data[struct.calcsize("d") :].split(b"\0")[0]
    return text.decode(errors="replace"), time.monotonic() - since


def device() -> torch.device:
    """The device of this rank.

    Raises:
        RuntimeError: this process is no rank.
    """
    if _Here.device is None:
        raise RuntimeError("device() is known in a rank only: ask in the function that run() calls")
    return _Here.device


def rank() -> int | None:
    """The number of this rank, or None outside a rank."""
    return _Here.rank


def enter(rank: int, where: torch.device, board: mmap.mmap | None = None) -> None:
    """Makes this process rank `rank` on `where`; notes go to `board` as well."""
    _Here.rank, _Here.device, _Here.board = rank, where, board


def without_multicast(environ: MutableMapping[str, str]) -> None:
    """Keeps NVLink multicast (NVLS) off, unless the environment decides otherwise.

    A multicast fault takes every GPU of the host down, not only those of the ranks that caused it.
    """
    environ.setdefault("NCCL_NVLS_ENABLE", "0")
    environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as plain data.

    `exc_type` and `text`; `traceback`, from the function that was run; `code`,
    the exit code of a sys.exit, else None; `when`, in seconds since the epoch.
    """
    name, text = type(error).__name__, str(error)
    if isinstance(error, RuntimeError) and "out of memory" in text and "cuda" in text.lower():
        name = "OutOfMemoryError"  # NCCL and others say it in a plain RuntimeError
    code = None
    if isinstance(error, SystemExit):  # as Python itself maps it
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    trace = error.__traceback__
    while trace and trace.tb_next and trace.tb_frame.f_code.co_filename in CALLERS:
        trace = trace.tb_next
    lines = traceback.format_exception(type(error), error, trace)
    return {
        "exc_type": name,
        "text": text,
        "traceback": "".join(lines),
        "code": code,
        "when": time.time(),
    }
