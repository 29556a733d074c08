"""Capturing a CUDA graph, for whoever times one."""

import contextlib
import gc

import torch


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool=None):
    """What is launched inside, on `stream`, becomes the graph. pool: of other graphs, to share.

    No garbage is collected meanwhile: a graph that is destroyed during a capture invalidates it.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            # thread_local: NCCL's watchdog thread may query its events while this thread captures.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what invalidated the capture is raised
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        if collects:
            gc.enable()


def refuse_capture(problem: str) -> None:
    """Raises RuntimeError inside a capture, where what `problem` misses could not be made."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{problem} yet and a graph is being captured; run this shape once before the capture"
        )
