"""Device time: steps measured in rounds inside the ranks, replayed later for pytest-benchmark.

A sample is the device time of a step: the mean of `calls` calls in a row, so many that a sample is
not too short to be timed. Every round times each step once, one after the
other (interleaved), so that heat and clocks treat all alike; before each timing the ranks meet in
a tiny all-reduce, and the slowest rank's time is the one that counts. Host time between rounds is
outside every pair of stamps.

    graph    a CUDA graph of `calls` calls, replayed between two device events (default on GPUs)
    events   eager calls between two device events: host gaps show, as a user's eager code has them
    sync     eager calls between two host readings with the device idle at both
    host     the CPU's mode: host readings, no device

L2 is warm: the calls follow each other on the same data. With `l2="cold"`, on GPUs, a sample is one
call, and before it a buffer larger than the L2 is overwritten, so that nothing of the step's is
left there. What it wrote is still to be written back when the call evicts it, as after any kernel.
"""

import contextlib
import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from blockshock.kernels import graphs

ON_GPUS = ("graph", "events", "sync")
MODES = (*ON_GPUS, "host")
CACHES = ("warm", "cold")
MAX_CALLS = 20
FLUSH = (
    4  # times the L2: so much is overwritten, so that no way of replacing lines keeps an old one
)
# The device idles this long (about 0.1 ms on an H200) before the ranks meet, so that the host has
# queued the meeting, the stamps and the work before the device comes to them.
LEAD_CYCLES = 200_000
SAMPLE_SECONDS = 4e-4  # short steps are repeated until a sample is about this long: an event
# resolves 0.5 µs, and a graph launch costs about 1 µs on the device (H200)


class Stopwatch:
    """Measures steps on one rank in one mode. `align` makes the ranks start together.

    l2: "warm", or "cold" on GPUs. Raises ValueError for a mode or a cache the device has not.
    """

    def __init__(
        self, mode: str, device: torch.device, align: Callable[[], None], *, l2: str = "warm"
    ):
        if mode not in MODES or (mode == "host") != (device.type == "cpu"):
            valid = "host" if device.type == "cpu" else ", ".join(ON_GPUS)
            raise ValueError(f"timing mode {mode!r} on {device.type}; valid there: {valid}")
        if l2 not in CACHES:
            raise ValueError(f"unknown l2 {l2!r}; use one of {', '.join(CACHES)}")
        if l2 == "cold" and device.type == "cpu":
            raise ValueError("l2 cold on cpu: only a GPU's L2 can be emptied; use l2 warm")
        self.mode, self.device, self.align, self.l2 = mode, device, align, l2
        self.flush = flusher(device) if l2 == "cold" else None

    def prepare(self, step: Callable[[], None]) -> tuple[Callable[[], None], int]:
        """Makes a step ready to be timed; returns the runnable and how many calls it makes.

        The number of calls is agreed among the ranks, so that they run the same collectives.
        With a cold L2 it is one: a second call would find what the first one left.
        """
        calls = 1
        if self.l2 == "warm":
            seconds = self._estimate(step)
            calls = min(MAX_CALLS, max(1, math.ceil(SAMPLE_SECONDS / seconds)))
        if self.mode != "graph":
            return lambda: _repeat(step, calls), calls
        return capture(lambda: _repeat(step, calls)).replay, calls

    def start(self, run: Callable[[], None]):
        """Times one run; returns a function that gives its seconds once the device is idle."""
        if self.mode in ("graph", "events"):
            torch.cuda._sleep(LEAD_CYCLES)
        if self.flush:
            self.flush()
        self.align()
        if self.mode in ("host", "sync"):
            self.idle()
            begin = time.perf_counter()
            run()
            self.idle()
            seconds = time.perf_counter() - begin
            return lambda: seconds
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3

    def _estimate(self, step: Callable[[], None]) -> float:
        """Rough seconds of one call, the same on all ranks."""
        if self.mode == "graph":
            step = capture(step).replay
        step()
        seconds = min(self._read(step) for _ in range(3))
        return agree_largest(max(seconds, 1e-7), self.device)

    def _read(self, step: Callable[[], None]) -> float:
        reading = self.start(step)
        self.idle()
        return reading()

    def idle(self) -> None:
        """Waits until the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def flusher(device: torch.device) -> Callable[[], None]:
    """A function that overwrites a buffer larger than the device's L2."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    if not size:
        raise ValueError(f"l2 cold on {device}: it does not say how large its L2 is; use l2 warm")
    return torch.empty(FLUSH * size, dtype=torch.uint8, device=device).zero_


def measure(
    stopwatch: Stopwatch,
    steps: list[Callable[[], None]],
    rounds: int,
    *,
    between: Callable[[], None] | None = None,
    notes: list[Callable[[], None]] | None = None,
) -> list[list[float]]:
    """Seconds of each round of each runnable on this rank: result[step][round].

    The steps of a round run in turn, the turn beginning one step later each round, so none always
    follows the same neighbour. between: called on the host before each timing.
    """
    readings = [[] for _ in steps]
    for turn in range(rounds):
        for offset in range(len(steps)):
            index = (turn + offset) % len(steps)
            if notes:
                notes[index]()
            if between:
                between()
            readings[index].append(stopwatch.start(steps[index]))
    stopwatch.idle()
    return [[reading() for reading in row] for row in readings]


def capture(step: Callable[[], None], around=contextlib.nullcontext) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call of `step`, warmed up on the capturing stream first.

    around: a context manager's factory, entered for the captured call and not for the warm-up.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what the warm-up left cannot be used by the graph
    graph = torch.cuda.CUDAGraph()
    with graphs.capturing(graph, stream), around():
        step()
    return graph


def agree_largest(value: float, device: torch.device) -> float:
    """The largest of the ranks' values. A collective."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def slowest(per_rank: list[list[float]], calls: int) -> list[float]:
    """Seconds of one call, round by round, on the slowest rank.

    Raises ValueError for a time that is not finite and positive, which would spoil the results
    file when it is closed.
    """
    samples = [max(times) / calls for times in zip(*per_rank, strict=True)]
    bad = [s for s in samples if not (math.isfinite(s) and s > 0)]
    if bad or not samples:
        raise ValueError(f"{len(bad)} of {len(samples)} times are not positive numbers: {bad[:3]}")
    return samples


class ReplayClock:
    """The timer that pytest-benchmark reads: it stands still but for the measured samples.

    It is set to zero before each round, so a difference of two readings is the sample itself, to
    the last digit.
    """

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark, samples: list[float]) -> None:
        """Feeds the samples to `benchmark.pedantic` and checks that it recorded just them.

        Raises RuntimeError when pytest-benchmark was given another timer or recorded other times.
        """
        pending = iter(samples)

        def reset():
            self.now = 0.0

        def advance():
            # --benchmark-cprofile calls once more than there are rounds.
            self.now = next(pending, 0.0)

        benchmark.pedantic(advance, setup=reset, rounds=len(samples), iterations=1)
        recorded = list(benchmark.stats.stats.data) if benchmark.stats else None
        if recorded != samples:
            raise RuntimeError(
                "pytest-benchmark did not record what the ranks measured; was the timer replaced "
                f"by a marker, or benchmarking disabled? recorded {recorded and recorded[:3]}, "
                f"measured {samples[:3]}"
            )


def _repeat(step: Callable[[], None], calls: int) -> None:
    for _ in range(calls):
        step()
