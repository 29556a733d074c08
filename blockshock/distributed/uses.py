"""One use of a group's shared memory after the other, on the device, from any stream and thread.

    begin    the current stream waits for the use before, where that was made in another stream
    end      records where this use ends in the current stream

A CUDA graph cannot wait for work outside it, nor the other way round. So the uses inside a capture
are ordered among themselves, by the streams of that capture, and those outside among themselves.
That a graph is replayed cannot be seen here.
"""

import threading

import torch


class Uses:
    """The uses of one group's shared memory on this rank; as a context, one whole use.

    A use is begun and ended by one thread in one stream. Another thread waits for its end.
    """

    def __init__(self):
        self._lock = threading.RLock()
        self._begun = None  # (stream of the use that has begun, whether a capture has it)
        self._last = None  # stream of the last use outside captures
        self._end = None  # event at the end of it; made once, because the CPU has none
        self._captured = None  # stream of the last use inside a capture

    def begin(self) -> None:
        """Before the first touch of the memory.

        Raises RuntimeError where this thread has not ended the use before.
        """
        self._lock.acquire()
        try:
            if self._begun:
                raise RuntimeError(
                    "a use of the group's shared memory began inside another one; wait for the "
                    "pending result first"
                )
            stream = torch.cuda.current_stream()
            captured = torch.cuda.is_current_stream_capturing()
            if captured:
                # Streams of one capture capture until its end; the last one may be of an earlier
                # graph.
                if self._captured not in (None, stream) and _captures(self._captured):
                    stream.wait_stream(self._captured)
            elif self._last not in (None, stream):
                stream.wait_event(self._end)
            self._begun = stream, captured
        except BaseException:
            self._lock.release()
            raise

    def end(self) -> None:
        """After the last touch, or after what makes the stream that began wait for it."""
        stream, captured = self._begun
        try:
            if captured:
                self._captured = stream
            else:
                self._end = self._end or torch.cuda.Event()
                self._end.record(stream)
                self._last = stream
        finally:
            self._begun = None
            self._lock.release()

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *_) -> None:
        self.end()


def _captures(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()
