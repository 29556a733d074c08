"""What this machine can do at most, measured once a session on every rank; the slowest counts.

    matrix_flops       dense products of random data, FLOP/s, for each dtype: the best of two sizes,
                       in short bursts (a long run is limited by power)
    copy_bytes_per_s   device-to-device copy, bytes read plus bytes written
    link_bytes_per_s   bytes each rank sends per second in a large all-reduce: 2 (R-1)/R of its size
                       (0 on one rank, where no floor has a wire term)

These are the rates behind every floor (`measure.floor`). They are what libraries reach here, not
what a datasheet promises.
"""

import time

import torch
import torch.distributed as dist

from blockshock.measure.clock import agree_largest
from blockshock.measure.floor import all_reduce_wire

# (sides of square products, bytes copied, bytes all-reduced, repetitions) by kind of device
SIZES = {"cuda": ((4096, 8192), 2**31, 2**28, 10), "cpu": ((128, 256), 2**26, 2**22, 3)}


def measure(dtypes: dict[str, torch.dtype], device: torch.device) -> dict:
    """The ceilings, for machine_info["blockshock"]["ceilings"]. A collective."""
    sides, copied, reduced, times = SIZES[device.type]
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    flops = {
        name: max(
            2 * side**3 / _seconds(_product(side, dtype, device), times, device) for side in sides
        )
        for name, dtype in dtypes.items()
    }
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = 2 * copied / _seconds(lambda: target.copy_(source), times, device)
    link = 0.0
    if ranks > 1:
        words = source[:reduced].view(torch.int32)
        link = all_reduce_wire(reduced, ranks) / _seconds(
            lambda: dist.all_reduce(words), times, device
        )
    return {"matrix_flops": flops, "copy_bytes_per_s": copy, "link_bytes_per_s": link}


def _product(side: int, dtype: torch.dtype, device: torch.device):
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _seconds(run, times: int, device: torch.device) -> float:
    """Shortest seconds of one call on this rank, the longest over the ranks."""
    run()
    samples = []
    for _ in range(3):
        _idle(device)
        begin = time.perf_counter()
        for _ in range(times):
            run()
        _idle(device)
        samples.append((time.perf_counter() - begin) / times)
    return agree_largest(min(samples), device)


def _idle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
