"""The learning rate of each step: linear warm-up, then half a cosine down to the least.

    step s = 1 … S, warm-up w:   lr s / w                                      s <= w
                                 min + (lr - min) (1 + cos π (s - w)/(S - w)) / 2   s > w

It is a function of the step alone, so there is no state to save. (SGDR, arXiv:1608.03983.)
"""

import math

from blockshock.lm.config import Train


def learning_rate(step: int, train: Train) -> float:
    """The rate of step `step`, counted from 1; the last step has `min_lr`."""
    if step <= train.warmup:
        return train.lr * step / train.warmup
    part = min(1.0, (step - train.warmup) / max(1, train.steps - train.warmup))
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * part)) / 2
