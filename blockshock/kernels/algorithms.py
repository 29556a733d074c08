"""Which cuSPARSELt algorithm multiplies a shape fastest, searched once and kept on disk.

cuSPARSELt has about twenty algorithms a shape; the default one is no faster than a dense product,
the best up to 1.65 times (H200, bf16), and some have returned wrong results on some devices
(pytorch#155333). So each is run, its product compared with the dense one, with a bias and without,
and the fastest of the correct ones is kept in `cache_file`.

A search tries all of them, which takes 0.1 to 1.2 s. From `LARGE` rows on it tries the best few of
another such batch, if one of at most `SPAN` times the size, or a `SPAN`th, was searched for the
same matrix. (On an H200 at N = K of 4096 to 16384 that costs at most 4 %. With fewer rows it would
cost up to 86 %: another algorithm has the tiles that 640 rows fill than 512.) In fp16 the library
(0.8.0, H200) compiles its kernel anew at every call: 0.19 s of host time, where bf16 takes 0.4 ms,
and all algorithms would take 35 s. So fp16 takes the first of bf16's best few that is correct.
(Replayed in a CUDA graph neither costs any host time.)
"""

import logging
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from blockshock import cache
from blockshock.kernels import cusparselt, graphs, pack

log = logging.getLogger("blockshock.tuning")

SPAN, LARGE, FEW = 2, 1024, 5
_REPLAYS, _ROUNDS = 4, 3  # replays timed together, and how often; the median counts

# Numbers from here on are not tried. The library refuses what it does not have (bf16 has 21), but
# in fp16 number 36 ends the CUDA context with an illegal instruction (0.8.0, H200).
_UNTRIED = {torch.bfloat16: 64, torch.float16: 36}


class AlgorithmError(RuntimeError):
    """No algorithm of the library gives a correct product for a shape."""


def cache_file() -> Path:
    """The file of this device's choices; its name carries the device and the library's version."""
    version = torch.backends.cusparselt.version()
    return cache.folder() / f"cusparselt-{version}-{cache.device_name()}.json"


def choose(batch: int, codes: Tensor, dtype: torch.dtype) -> int:
    """The algorithm for X Wᵀ, x [B, K], codes [N, K/4] of W; searched when the cache has none.

    B is a multiple of 8.

    Raises RuntimeError inside a CUDA graph capture when the shape was never searched: the search
    runs and compares products, which a capture forbids.
    """
    key = _key(batch, *codes.shape, dtype)
    table = _table()
    if key not in table:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"no cuSPARSELt algorithm is known for {key} and a graph is being captured; "
                "run this shape once before the capture"
            )
        with torch.no_grad():
            found = _search(batch, codes, dtype)
        kept = _checked(cache.add(cache_file(), {key: found}))
        if key not in kept:  # the file has it in another form, such as an older version's
            kept = _checked(cache.add(cache_file(), {key: found}, replace=True))
        table.update(kept)
    return table[key][0]


def known(batch: int, rows: int, columns: int, dtype: torch.dtype) -> int | None:
    """The algorithm already chosen for a shape, or None; never searches."""
    return next(iter(_table().get(_key(-(-batch // 8) * 8, rows, columns // 4, dtype), ())), None)


def _key(batch: int, rows: int, groups: int, dtype: torch.dtype) -> str:
    return f"{rows}x{4 * groups} B{batch} {str(dtype).removeprefix('torch.')}"


@lru_cache(maxsize=1)
def _table() -> dict[str, list[int]]:
    """The algorithms of each shape, best first: several where all were tried, else one."""
    return _checked(cache.read(cache_file()))


def _checked(table: dict) -> dict[str, list[int]]:
    def is_choice(found) -> bool:
        return isinstance(found, list) and bool(found) and all(type(n) is int for n in found)

    return {key: found for key, found in table.items() if is_choice(found)}


def _search(batch: int, codes: Tensor, dtype: torch.dtype) -> list[int]:
    """The algorithms of a shape, best first; one where only a few were tried."""
    best = [choose(batch, codes, torch.bfloat16)] if dtype == torch.float16 else []
    others = _best_nearby(batch, *codes.shape) or []  # after bf16's search, which it may find
    few = list(dict.fromkeys(best + others))
    if dtype == torch.float16:
        log.info("in fp16 the library compiles an algorithm at each call, about 0.2 s")
    trial = _Trial(batch, codes, dtype)
    for numbers in (few, trial.numbers()):
        right = (number for number in numbers if trial.agrees(number))
        if dtype == torch.float16:
            found = list(islice(right, 1))
        else:
            found = sorted(right, key=trial.milliseconds)[: 1 if numbers is few else FEW]
        if found:
            return found
    raise AlgorithmError(
        f"no cuSPARSELt algorithm multiplies {_key(batch, *codes.shape, dtype)} correctly on "
        f"{torch.cuda.get_device_name()}; use method block_shock_folded or a dense method"
        + (f" (its last refusal: {trial.refusal})" if trial.refusal else "")
    )


def _best_nearby(batch: int, rows: int, groups: int) -> list[int] | None:
    """bf16's best few of this batch, or of the nearest by ratio, where all were tried."""
    near = {}
    for key, found in _table().items():
        shape, _, rest = key.partition(" B")
        other, _, dtype = rest.partition(" ")
        if len(found) > 1 and dtype == "bfloat16" and shape == f"{rows}x{4 * groups}":
            less, more = sorted((int(other), batch))
            if less == more or (less >= LARGE and more <= SPAN * less):
                near[more / less] = found
    return near[min(near)] if near else None


class _Trial:
    """Products of a shape by each algorithm, held against the dense one."""

    def __init__(self, batch: int, codes: Tensor, dtype: torch.dtype):
        N, kept = codes.shape[0], codes.shape[1] * 2
        self.refusal = None
        random = torch.Generator(codes.device).manual_seed(batch * 7919 + 2 * kept)
        # Random values in place of the weight's, in which zeros could not tell right from wrong,
        # and which the library may have given places of its own.
        like = torch.empty(0, dtype=dtype, device=codes.device)
        x, values, bias = (
            like.new_empty(size).normal_(generator=random)
            for size in ((batch, 2 * kept), (N, kept), (N,))
        )
        self.x, self.compressed = x, like.new_empty(N, kept * 9 // 8)
        self.compressed.view(-1)[: values.numel()] = values.view(-1)
        cusparselt.write_all_metadata(self.compressed, codes)
        dense = pack.expand(values, codes)
        self.truths = [(b, F.linear(x, dense, b)) for b in (None, bias)]
        self.ended, self.last = False, _UNTRIED[dtype]

    def numbers(self):
        """Those that the library may have."""
        self.ended = False  # a refused number of another shape or dtype says nothing of these
        for number in range(self.last):
            if self.ended:
                return
            yield number

    def agrees(self, number: int) -> bool:
        """Whether its products are right, with a bias and without."""
        try:
            return all(
                _agrees(_poisoned_run(self.x, self.compressed, bias, number), truth)
                for bias, truth in self.truths
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The library has no algorithm of this number, nor of any higher one.
            self.ended = self.ended or "AlgSetAttribute" in str(error)
            self.refusal = str(error)  # not the error, whose frames would be kept alive
            return False

    def milliseconds(self, number: int) -> float:
        """Median device time of a product."""
        return _time(lambda: cusparselt.run(self.x, self.compressed, None, number))


def _poisoned_run(x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    """One product whose buffer the allocator takes from a block just filled with NaN."""
    poison = x.new_full((x.shape[0], compressed.shape[0]), torch.nan)
    del poison
    return cusparselt.run(x, compressed, bias, algorithm)


def _agrees(result: Tensor, truth: Tensor) -> bool:
    """Both round a float32 sum once, so they differ by about 0.3 eps (root mean square).

    0.6 eps in the norm finds a wrong tile, the largest difference a wrong element; NaN passes
    neither.
    """
    eps = torch.finfo(truth.dtype).eps
    truth = truth.float()
    difference = result.float().sub_(truth)
    relative = difference.norm() / truth.norm()
    largest = difference.abs().max() / truth.abs().max()
    return bool(relative <= 0.6 * eps) and bool(largest <= 2 * eps)


def _time(call) -> float:
    """Median device milliseconds of a call, replayed as a graph: host time plays no part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with graphs.capturing(graph, stream):
        call()
    graph.replay()
    times = []
    for _ in range(_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[_ROUNDS // 2]
