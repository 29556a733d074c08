"""What passes between a pool and its ranks: frames on a socket, objects as pickles.

A frame is one byte that says what it is, eight bytes of length, and that many bytes. The parent
reads and writes without blocking, so that a rank that stops in the middle of a frame costs the
deadline and no more; a rank may block, because it has nothing else to do.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
from typing import Any

import torch

# parent to rank
JOB, LEAVE = b"J", b"L"
# rank to parent
READY, RESULT, FAILED = b"Y", b"R", b"F"

_HEADER = struct.Struct("<cQ")


class _Pickler(pickle.Pickler):
    """Plain pickle (by value, no shared memory), which refuses tensors that live on a device."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.device.type != "cpu":
            raise ValueError(
                f"a tensor on {obj.device} cannot leave its process; send `.cpu()` of it"
            )
        return NotImplemented


def dumps(obj: Any, what: str) -> bytes:
    """`obj` as bytes. ValueError that begins with `what` and says why it cannot be pickled."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=5).dump(obj)
    except Exception as error:  # pickle raises TypeError, AttributeError, PicklingError and others
        raise ValueError(
            f"{what} cannot be pickled ({error}). Between a pool and its ranks go tensors on CPU, "
            "plain data, and functions and classes from the top level of an importable module: "
            "no lambda, no nested function, no open file"
        ) from error
    return buffer.getvalue()


def frame(tag: bytes, payload: bytes = b"") -> bytes:
    """One whole frame, ready to be sent."""
    return _HEADER.pack(tag, len(payload)) + payload


def send(sock: socket.socket, tag: bytes, payload: bytes = b"") -> None:
    """Sends one frame, blocking."""
    sock.sendall(_HEADER.pack(tag, len(payload)))
    sock.sendall(payload)


class Inbox:
    """The frames that arrive on a socket. `take` works on blocking and non-blocking sockets."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self.progress = 0  # bytes taken so far
        self._expect_header()

    def _expect_header(self) -> None:
        self._tag, self._buffer, self._filled = None, bytearray(_HEADER.size), 0

    def take(self) -> tuple[bytes, bytearray] | None:
        """Reads once; a frame (tag, payload) when that completed one, else None.

        Raises:
            EOFError: the other end is closed.
            BlockingIOError: the socket does not block and has nothing now.
        """
        with memoryview(self._buffer) as view:
            try:
                count = self._sock.recv_into(view[self._filled :])
            except ConnectionError as error:
                raise EOFError(str(error)) from error
        if not count:
            raise EOFError("the other end is closed")
        self._filled += count
        self.progress += count
        if self._filled < len(self._buffer):
            return None
        if self._tag is None:
            self._tag, length = _HEADER.unpack(self._buffer)
            self._buffer, self._filled = bytearray(length), 0
            if length:
                return None
        done = self._tag, self._buffer
        self._expect_header()
        return done
