"""Batches whose images and targets are mixed in pairs: each image with the one before it.

    mixup    x = λ x + (1 − λ) x'           everywhere        (arXiv:1710.09412)
    cutmix   x = x' inside a box, else x    λ: share outside  (arXiv:1905.04899)
    target   λ y + (1 − λ) y',  λ ~ Beta(α, α)

What is drawn follows from the seed alone, on the host, so that a run goes on with the same bits.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor


def mix(
    images: Tensor, labels: Tensor, classes: int, *, mixup: float, cutmix: float, seed: str
) -> tuple[Tensor, Tensor]:
    """images [B, C, H, W], labels int64 [B] -> mixed images, targets float32 [B, classes].

    mixup, cutmix: α, or 0 for none of it; where both are given, each has half the batches. The
    images may be written to.
    """
    targets = F.one_hot(labels, classes).float()
    drawn = random.Random(seed)
    by_box = cutmix and (not mixup or drawn.random() < 0.5)
    alpha = cutmix if by_box else mixup
    if not alpha:
        return images, targets
    share = drawn.betavariate(alpha, alpha)
    if by_box:
        rows, columns = _box(*images.shape[-2:], share, drawn)
        images[..., rows, columns] = images.roll(1, 0)[..., rows, columns]
        inside = (rows.stop - rows.start) * (columns.stop - columns.start)
        share = 1 - inside / images[0, 0].numel()
    else:
        images = torch.lerp(images.roll(1, 0), images, share)
    return images, torch.lerp(targets.roll(1, 0), targets, share)


def _box(height: int, width: int, share: float, drawn: random.Random) -> tuple[slice, slice]:
    """A box of (1 − share) of the image around any of its pixels, cut at the edges."""
    found = []
    for size in (height, width):
        half = size * math.sqrt(1 - share) / 2
        centre = drawn.uniform(0, size)
        found.append(slice(max(0, round(centre - half)), min(size, round(centre + half))))
    return found[0], found[1]
