"""Candidates for the same work, timed side by side on the device, on all ranks of a group together.

Each candidate is captured in a CUDA graph, short ones several times in a row, so host time plays no
part. After a first look those far behind drop out; the others run in turn, round by round. What the
ranks compare is the slowest rank's time, and they compare the same numbers, so they agree without
asking each other.
"""

import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from statistics import median

import torch
import torch.distributed as dist

from blockshock.kernels import graphs
from blockshock.kernels.algorithms import AlgorithmError

LOOKS = 4  # samples of a first look
SAMPLE_SECONDS, MOST_CALLS = 3e-4, 16  # a graph has so many calls that it takes about so long
SECONDS = 1.0  # once a race has lasted so long, no further candidate enters it
RUN_SECONDS, FEWEST_ROUNDS = 0.5, 5  # rounds end after so long, by the times known before
# The device idles so long before a sample (1 ms on an H100), while the host queues its work: with a
# tenth of it a busy host came late, and a first look of one call took up to five times too long.
LEAD_CYCLES, LEAD_SECONDS = 2_000_000, 1e-3

Step = Callable[[], object]


class Race:
    """The candidates so far, and their times. Every rank of the group makes the same calls."""

    def __init__(self, device: torch.device, group=None):
        self.device, self.group = device, group
        self.shared = dist.is_initialized() and dist.get_world_size(group) > 1
        self.token = torch.zeros(1, device=device)
        self.stream = _stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # one for all: they never run at once
        self.calls = 1
        self.began, self.once = time.perf_counter(), 0.0
        self.graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
        self.seconds: dict[str, float] = {}

    def cannot(self, step: Step) -> Exception | None:
        """Runs what a rank does of a candidate, without the others; why one of them cannot.

        No correct algorithm and a lack of memory are reasons; other errors are raised.
        """
        problem = None
        try:
            self._warm_up(step)
        except (AlgorithmError, torch.cuda.OutOfMemoryError) as error:
            problem = error
        if self._agreed([float(problem is not None)])[0] and problem is None:
            return RuntimeError("another rank of the group cannot run it; its error says why")
        return problem

    def enter(self, steps: Iterable[tuple[str, Step]]) -> None:
        """Captures the candidates and takes a first look at each, as long as there is time.

        The first one always enters. What the first call of each takes is not counted: it makes
        buffers, compiles, and searches cuSPARSELt's algorithms, each of which is done once.
        """
        for name, step in steps:
            if self.seconds and self._agreed([self.elapsed - self.once])[0] > SECONDS:
                break
            self._warm_up(step)
            self._look(name, step)
            enough = round(SAMPLE_SECONDS / min(self.seconds.values()))
            if self.calls == 1 < enough:  # known from the first candidate on
                self.calls = min(MOST_CALLS, enough)
                self._look(name, step)

    def near(self, factor: float) -> list[str]:
        """Those at most `factor` times as slow as the fastest, fastest first."""
        best = min(self.seconds.values())
        names = sorted(self.seconds, key=self.seconds.get)
        return [name for name in names if self.seconds[name] <= factor * best]

    def run(self, names: list[str], rounds: int) -> None:
        """Times the named ones in turn, round by round; their times are then medians.

        rounds: at most; fewer where they would take longer than `RUN_SECONDS`.
        """
        if len(names) < 2:
            return
        one = sum(LEAD_SECONDS + self.graphs[n][1] * self.seconds[n] for n in names)
        rounds = min(rounds, max(FEWEST_ROUNDS, int(RUN_SECONDS / one)))
        readings = {name: [] for name in names}
        for turn in range(rounds):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                readings[name].append(self._sample(name))
        torch.cuda.synchronize(self.device)
        samples = [reading() for name in names for reading in readings[name]]
        slowest = iter(self._agreed(samples))
        for name in names:
            self.seconds[name] = median(next(slowest) for _ in range(rounds))

    @property
    def elapsed(self) -> float:
        """Seconds since it began, on this rank's host."""
        return time.perf_counter() - self.began

    def _warm_up(self, step: Step) -> None:
        began = time.perf_counter()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            step()
        torch.cuda.synchronize(self.device)
        self.once += time.perf_counter() - began

    def _look(self, name: str, step: Step) -> None:
        graph = torch.cuda.CUDAGraph()
        with graphs.capturing(graph, self.stream, self.pool):
            for _ in range(self.calls):
                step()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.graphs[name] = graph, self.calls
        looks = [self._sample(name) for _ in range(1 + LOOKS)]
        torch.cuda.synchronize(self.device)
        (self.seconds[name],) = self._agreed([min(look() for look in looks[1:])])

    def _sample(self, name: str) -> Callable[[], float]:
        """Runs a candidate; returns a function that gives a call's seconds, once that is idle."""
        graph, calls = self.graphs[name]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(LEAD_CYCLES)
        if self.shared:
            dist.all_reduce(self.token, group=self.group)  # no rank passes before the last arrives
        begin.record()
        graph.replay()
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3 / calls

    def _agreed(self, values: list[float]) -> list[float]:
        """The largest of the ranks' values, each."""
        if not self.shared:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all races: libraries keep a workspace for each stream they ever saw."""
    return torch.cuda.Stream(device)
