"""The vision transformer of a config, its supermasks, and its accuracy over the images."""

import warnings
from typing import Any

import torch
from torch import nn

from blockshock.block_sparse import Settings, apply_supermask, cubic, supermasks
from blockshock.block_sparse.model import kind
from blockshock.linear.convert import Conversion
from blockshock.runs.device import autocast, to_device
from blockshock.runs.ranks import Ranks
from blockshock.runs.settings import Refused
from blockshock.transformer.vision import (
    SHAPES,
    VisionConfig,
    VisionTransformer,
    compile_vision,
)
from blockshock.vision import config as settings
from blockshock.vision.config import Config, Sparse
from blockshock.vision.data import Source, split

KINDS = ("linear", "conv1x1", "conv")  # of layers that masks are made for


def vision_config(config: Config) -> VisionConfig:
    """The sizes of the model. Raises Refused where no such model can be."""
    given = settings.to_dict(config)["model"]
    shape = given.pop("shape")
    if shape is not None and shape not in SHAPES:
        raise Refused(f"model.shape = {shape!r}: use one of {', '.join(SHAPES)}, or null")
    sizes = SHAPES.get(shape, {}) | {key: v for key, v in given.items() if v is not None}
    missing = {"patch", "width", "depth", "heads"} - sizes.keys()
    if missing:
        raise Refused(
            f"model: {', '.join(sorted(missing))} not given; set model.shape to one of "
            f"{', '.join(SHAPES)}, or give the sizes"
        )
    try:
        return VisionConfig(**sizes)
    except ValueError as error:
        raise Refused(f"model: {error}") from error


def make(config: Config, device: torch.device) -> tuple[VisionTransformer, Conversion | None]:
    """The model under its supermasks, with the initial weights of `train.seed`, and the report.

    It is alike on every rank and device. Without a sparsity above 0 there is no mask and no report.
    """
    generator = torch.Generator().manual_seed(config.train.seed)
    model = VisionTransformer(vision_config(config), generator=generator, device=device)
    return model, cover(model, config.sparse)


def cover(model: nn.Module, sparse: Sparse) -> Conversion | None:
    """Puts the settings' masks over the model's layers, at their last sparsity.

    Raises Refused where none can have one.
    """
    same = {"block": sparse.block, "gradient": sparse.gradient}
    same |= {"fixed_mask": sparse.fixed_mask, "fixed_weight": sparse.fixed_weight}
    wanted = {
        name: Settings(sparsity=getattr(sparse, name), **same)
        for name in KINDS
        if getattr(sparse, name) > 0
    }
    if not wanted:
        return None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "apply_supermask changed nothing")  # an error follows
            report = apply_supermask(model, **wanted, skip=tuple(sparse.skip))
    except ValueError as error:
        raise Refused(f"sparse: {error}") from error
    if not report.replaced:
        reasons = "; ".join(dict.fromkeys(report.left.values()))
        raise Refused(f"sparse: no layer can have a mask: {reasons}")
    return report


class Schedule:
    """The sparsity of a model's masks by the step, which ends where `cover` has set it."""

    def __init__(self, model: nn.Module, sparse: Sparse, steps: int):
        self._layers = [(layer, getattr(sparse, kind(layer))) for _, layer in supermasks(model)]
        self._begin, self._end = round(sparse.begin * steps), round(sparse.end * steps)
        self._step = -1

    def set(self, step: int) -> None:
        """Gives the layers the sparsity of step `step`, counted from 1."""
        step = min(step, self._end)
        if step == self._step:
            return
        for layer, final in self._layers:
            layer.sparsity = cubic(step, begin=self._begin, end=self._end, final=final)
        self._step = step


def compiled(model: VisionTransformer, config: Config) -> VisionTransformer:
    """The model, its blocks compiled if `train.compile` says so."""
    return compile_vision(model) if config.train.compile else model


@torch.no_grad()
def accuracy(
    model: nn.Module, source: Source, config: Config, ranks: Ranks, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """{"top1", "top5", "loss", "images"} over the validation images. A collective.

    top1, top5: shares in percent. loss: mean cross-entropy in nats. dtype: of the images, None:
    float32 under `train.autocast`.
    """
    training, batch = model.training, config.use.batch
    model.eval()
    found = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    numbers = list(split(source.val, batch, ranks.rank, ranks.size))
    asked = [[min(number, source.val - 1) for number in part] for part in numbers]
    products = "none" if dtype else config.train.autocast
    for part, (images, labels) in zip(numbers, source.validation(asked), strict=True):
        counts = torch.tensor([number < source.val for number in part])
        images, labels, counts = (to_device(t, ranks.device) for t in (images, labels, counts))
        with autocast(products, ranks.device):
            logits = model(images.to(dtype or images.dtype)).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        rows = (ranked[:, 0], ranked.any(1), losses, counts)
        found += torch.stack([(row * counts).sum(dtype=torch.float64) for row in rows])
    model.train(training)
    first, any_, loss, images = ranks.mean(found)
    return {
        "top1": 100 * first / images,
        "top5": 100 * any_ / images,
        "loss": loss / images,
        "images": round(images * ranks.size),
    }
