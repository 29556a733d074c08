"""How long a model takes for a batch, dense and with its pruned layers in each storage."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from blockshock.measure import clock
from blockshock.runs.files import written_whole
from blockshock.runs.settings import Refused
from blockshock.vision.config import STORAGES, Config
from blockshock.vision.storage import DTYPES, folded, hold


@torch.no_grad()
def benchmark(
    config: Config, device: torch.device, tell: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Times the model in every storage, in turn, round by round; in one process.

    Shows, and writes to `<run>/benchmark.json`, by storage: {"ms": median of the rounds,
    "images_per_s", "speedup": dense's time over its own}, or {"left": why it was not timed}. On a
    GPU the step is a CUDA graph. Times do not depend on what was trained: without a checkpoint the
    weights are the initial ones.
    """
    use, size = config.use, config.model
    images = torch.randn(use.batch, size.channels, size.image, size.image, device=device)
    images = images.to(DTYPES[use.dtype])
    stopwatch = clock.Stopwatch("graph" if device.type == "cuda" else "host", device, lambda: None)
    steps, found = {}, {}
    for storage in STORAGES:
        model, names, step = folded(config, device)
        try:
            model = hold(model, names, storage, config, tell)
        except Refused as error:
            found[storage] = {"left": str(error)}
            tell(f"{storage} is not timed: {error}")
            continue
        steps[storage] = stopwatch.prepare(lambda model=model: model(images))
    rounds = clock.measure(stopwatch, [run for run, _ in steps.values()], use.rounds)
    about = "initial weights" if step is None else f"weights of step {step}"
    tell(f"{use.batch} images of {size.image} pixels, {use.dtype}, {device.type}, {about}")
    for (storage, (_, calls)), seconds in zip(steps.items(), rounds, strict=True):
        one = statistics.median(seconds) / calls
        found[storage] = {"ms": 1e3 * one, "images_per_s": use.batch / one}
        found[storage]["speedup"] = found["dense"]["ms"] / found[storage]["ms"]
        tell(
            f"{storage}: {1e3 * one:.3f} ms, {use.batch / one:,.0f} images/s, "
            f"{found[storage]['speedup']:.2f} x dense"
        )
    with written_whole(Path(config.run) / "benchmark.json") as out:
        out.write(json.dumps(found, indent=1).encode())
    return found
