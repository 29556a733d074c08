"""Which cuSPARSELt algorithm multiplies a shape fastest, searched once and kept on disk.

cuSPARSELt has about twenty algorithms a shape; the default one is no faster than a dense product,
the best up to 1.65 times (H200, bf16), and some have returned wrong results on some devices
(pytorch#155333). So each is run, its product compared with the dense one, with a bias and without,
and the fastest of the correct ones is kept in `$BLOCKSHOCK_CACHE` (default `~/.cache/blockshock`),
a JSON file a device.

In fp16 the library (0.8.0, H200) compiles its kernel anew at every call: 0.19 s of host time, where
bf16 takes 0.4 ms. Replayed in a CUDA graph neither costs any.
"""

import fcntl
import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from blockshock import choices
from blockshock.kernels import pack

_REPLAYS, _ROUNDS = 4, 3  # replays timed together, and how often; the median counts

# Numbers from here on are not tried. The library refuses what it does not have (bf16 has 21), but
# in fp16 number 36 ends the CUDA context with an illegal instruction (0.8.0, H200).
_UNTRIED = {torch.bfloat16: 64, torch.float16: 36}


class AlgorithmError(RuntimeError):
    """No algorithm of the library gives a correct product for a shape."""


def cache_file() -> Path:
    """The file of this device's choices; its name carries the device and the library's version."""
    version = torch.backends.cusparselt.version()
    return choices.folder() / f"cusparselt-{version}-{choices.device_name()}.json"


def choose(x: Tensor, compressed: Tensor, values: Tensor, codes: Tensor) -> int:
    """The algorithm for X Wᵀ with x [B, K] and W [N, K]; searched when the cache has none.

    Raises RuntimeError inside a CUDA graph capture when the shape was never searched: the search
    launches and synchronises, so run the shape once before capturing. Raises AlgorithmError when
    no algorithm is correct.
    """
    key = _key(x.shape[0], compressed.shape[0], x.shape[1], x.dtype)
    table = _table()
    if key not in table:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"no cuSPARSELt algorithm is known for {key} and a graph is being captured; "
                "run this shape once before the capture"
            )
        with torch.no_grad():
            found = _search(key, x.shape, compressed, values.detach(), codes)
        table.update(_store({key: found}))
    return table[key]


def known(batch: int, rows: int, columns: int, dtype: torch.dtype) -> int | None:
    """The algorithm already chosen for a shape, or None; never searches."""
    return _table().get(_key(-(-batch // 8) * 8, rows, columns, dtype))


def _key(batch: int, rows: int, columns: int, dtype: torch.dtype) -> str:
    return f"{rows}x{columns} B{batch} {str(dtype).removeprefix('torch.')}"


@lru_cache(maxsize=1)
def _table() -> dict[str, int]:
    return _read(cache_file())


def _read(file: Path) -> dict[str, int]:
    try:
        table = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}  # absent or damaged: a cache only saves time, the search makes it again
    return {k: v for k, v in table.items() if isinstance(v, int)} if isinstance(table, dict) else {}


def _store(found: dict[str, int]) -> dict[str, int]:
    """Adds to the file and returns what it holds now: of ranks that search at once, the first one's
    choice stands, so that the next run repeats this one's sums to the bit."""
    file, written, folder = cache_file(), None, None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(file.parent, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        merged = found | _read(file)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
            written = Path(out.name)
            json.dump(merged, out, indent=1, sort_keys=True)
        written.replace(file)
    except OSError:
        # A read-only or full disk costs a search next time, nothing else.
        if written is not None:
            written.unlink(missing_ok=True)
        return found
    finally:
        if folder is not None:
            os.close(folder)
    return merged


def _search(key: str, shape, compressed: Tensor, values: Tensor, codes: Tensor) -> int:
    from blockshock.kernels import sparse24

    random = torch.Generator(values.device).manual_seed(shape[0] * 7919 + shape[1])
    # Random values in place of the weight's, in which zeros could not tell right from wrong, and
    # which the library may have given places of its own.
    values = torch.empty_like(values).normal_(generator=random)
    x, bias = (
        values.new_empty(size).normal_(generator=random) for size in (shape, values.shape[:1])
    )
    compressed = torch.empty_like(compressed)
    compressed.view(-1)[: values.numel()] = values.view(-1)
    sparse24.write_all_metadata(compressed, codes)
    dense = pack.expand(values, codes)
    truths = [(b, F.linear(x, dense, b)) for b in (None, bias)]
    timed, refusal = [], None
    for algorithm in range(_UNTRIED[values.dtype]):
        try:
            right = all(
                _agrees(_poisoned_run(sparse24.run, x, compressed, b, algorithm), truth)
                for b, truth in truths
            )
            if right:
                seconds = _time(lambda a=algorithm: sparse24.run(x, compressed, None, a))
                timed.append((seconds, algorithm))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "AlgSetAttribute" in str(error):
                break  # the library has no algorithm of this number, nor of any higher one
            refusal = error
    if not timed:
        raise AlgorithmError(
            f"no cuSPARSELt algorithm multiplies {key} correctly on "
            f"{torch.cuda.get_device_name()}; use method block_shock_folded or a dense method"
        ) from refusal
    return min(timed)[1]


def _poisoned_run(
    run, x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: int
) -> Tensor:
    """One product whose buffer the allocator takes from a block just filled with NaN."""
    poison = x.new_full((x.shape[0], compressed.shape[0]), torch.nan)
    del poison
    return run(x, compressed, bias, algorithm)


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
    # thread_local: NCCL's watchdog thread may query its events while this thread captures.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
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
