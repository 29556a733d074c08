"""Named stretches of a step, timed in a pass of their own.

    with region("allreduce", bytes=y.nbytes):
        dist.all_reduce(y)

Without an active recorder a region costs one comparison. With one, it is bracketed by device
events (host clock readings on the CPU). Regions may nest, and a name may occur several times a
step; occurrences are added up. The instrumented pass never contributes to the step time that is
reported. Inside a CUDA graph the events are `external`, so each replay stamps them again.
"""

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# Not thread-local: autograd runs backward regions in its own thread while the caller waits.
_active: "Recorder | None" = None


@contextmanager
def region(name: str, *, bytes: int = 0):
    """Times the enclosed work under `name` when a recorder is active; bytes are what it copies."""
    recorder = _active
    if recorder is None:
        yield
        return
    start = recorder.stamp()
    yield
    recorder.marks.append((name, start, recorder.stamp(), bytes))


@dataclass
class Recorder:
    """Collects the regions of the steps run inside `recording`.

    captured: the step is being captured in a CUDA graph; read times with `collect` after a replay.
    """

    device_type: str
    captured: bool = False
    marks: list = field(default_factory=list)
    samples: dict = field(default_factory=lambda: defaultdict(list))
    counts: dict = field(default_factory=dict)

    def stamp(self):
        """The present moment: a recorded device event, or host seconds on the CPU."""
        if self.device_type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=self.captured)
        event.record()
        return event

    def collect(self) -> None:
        """Adds one step's times to the samples; for a captured step call it after each replay."""
        if self.device_type == "cuda":
            torch.cuda.synchronize()
        seconds, counts = defaultdict(float), defaultdict(lambda: [0, 0])
        for name, start, end, size in self.marks:
            seconds[name] += _elapsed(start, end)
            counts[name][0] += 1
            counts[name][1] += size
        for name, value in seconds.items():
            self.samples[name].append(value)
        self.counts = {name: tuple(value) for name, value in counts.items()}
        if not self.captured:
            self.marks.clear()


@contextmanager
def recording(recorder: Recorder):
    """Makes `recorder` the one that regions report to; recorders do not nest."""
    global _active
    if _active is not None:
        raise RuntimeError("a region recorder is active already; recorders do not nest")
    _active = recorder
    try:
        yield recorder
    finally:
        _active = None


def _elapsed(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
