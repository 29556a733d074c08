"""The learning rate of each step: linear warm-up, then half a cosine down to the least.

    step s = 1 … S, warm-up w:   lr s / w                                      s <= w
                                 min + (lr - min) (1 + cos π (s - w)/(S - w)) / 2   s > w

It is a function of the step alone, so there is no state to save. (SGDR, arXiv:1608.03983.)
"""

import math
from typing import Protocol

from blockshock.runs.settings import Refused


class Rates(Protocol):
    """What a config's section `train` says of the rate; warmup and steps count steps."""

    steps: int
    lr: float
    min_lr: float
    warmup: int


def check(train: Rates) -> None:
    """Raises Refused where the least rate is above the rate, or the warm-up leaves no step."""
    if train.min_lr > train.lr:
        raise Refused(f"train.min_lr = {train.min_lr:g} exceeds train.lr = {train.lr:g}; lower it")
    if train.warmup >= train.steps:
        raise Refused(
            f"train.warmup = {train.warmup} leaves no step of train.steps = {train.steps} at the "
            "full rate; lower the warm-up, or raise the steps"
        )


def learning_rate(step: int, train: Rates) -> float:
    """The rate of step `step`, counted from 1; the last step has `min_lr`."""
    if step <= train.warmup:
        return train.lr * step / train.warmup
    part = min(1.0, (step - train.warmup) / max(1, train.steps - train.warmup))
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * part)) / 2
