"""The accuracy of a trained model before and after its pruned layers are converted."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockshock.measure import environment
from blockshock.runs.device import to_device
from blockshock.runs.files import written_whole
from blockshock.runs.ranks import Ranks
from blockshock.runs.settings import Refused
from blockshock.vision.config import Config
from blockshock.vision.data import Source, split
from blockshock.vision.model import accuracy, vision_config
from blockshock.vision.storage import DTYPES, folded, hold


def evaluate(
    config: Config, source: Source, ranks: Ranks, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measures the run's checkpoint; shows it and writes `<run>/evaluation.json`. A collective.

    {"step", "storage", "dtype", "sizes", "folded", "converted", "apart", "machine", "commit_info"}:
    sizes are those of the model, also where the settings name a shape; `folded` and `converted` are
    what `model.accuracy` gives; apart is the relative difference (Frobenius) of the logits of one
    batch; the last two are of `measure.environment`.

    Raises:
        Refused: no checkpoint, or one of another model; a storage that no layer can be held in.
    """
    use = config.use
    model, names, step = folded(config, ranks.device)
    if step is None:
        raise Refused(f"{config.run}: no checkpoint there; train first, or name the run's folder")
    found = {"step": step, "storage": use.storage, "dtype": use.dtype}
    found["sizes"] = dataclasses.asdict(vision_config(config))
    dtype = DTYPES[use.dtype]
    found["folded"] = accuracy(model, source, config, ranks, dtype)
    before = _logits(model, source, config, ranks)
    model = hold(model, names, use.storage, config, tell)
    found["converted"] = accuracy(model, source, config, ranks, dtype)
    after = _logits(model, source, config, ranks)
    found["apart"] = float((after - before).norm() / before.norm())
    for name in ("folded", "converted"):
        tell(
            f"{name if name == 'folded' else use.storage} after step {step}: top-1 "
            f"{found[name]['top1']:.2f} %, top-5 {found[name]['top5']:.2f} %, loss "
            f"{found[name]['loss']:.4f}, over {found[name]['images']} images"
        )
    tell(f"logits before and after conversion are {found['apart']:.1e} apart ({use.dtype})")
    found["machine"] = environment.describe(kind=ranks.device.type, ranks=ranks.size)
    found["commit_info"] = environment.commit()
    if ranks.first:
        with written_whole(Path(config.run) / "evaluation.json") as out:
            out.write(json.dumps(found, indent=1).encode())
    return found


@torch.no_grad()
def _logits(model: nn.Module, source: Source, config: Config, ranks: Ranks) -> torch.Tensor:
    """Of the first batch of validation images [B, classes], float64."""
    first = next(split(source.val, min(config.use.batch, source.val)))
    images, _ = next(iter(source.validation([first])))
    images = to_device(images, ranks.device).to(DTYPES[config.use.dtype])
    return model(images).double()
