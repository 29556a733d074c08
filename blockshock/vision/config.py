"""The settings of a run: frozen dataclasses, read from YAML, checked by one rule each.

    config = load("digits", ["sparse.linear=0.9", "run=runs/first"])

A file is a path, or the name of one in `blockshock/vision/configs`. It gives what differs from the
defaults below. A key is `section.name`, or `run` or `device`, which stand in no section.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockshock.runs import schedule
from blockshock.runs import settings as reading
from blockshock.runs.settings import SEEDS, Refused, choice, dump, least, to_dict

__all__ = ["CONFIGS", "Config", "dump", "from_dict", "load", "to_dict"]

CONFIGS = Path(__file__).with_name("configs")
STORAGES = ("dense", "bsr", "semi_structured")


@dataclass(frozen=True)
class Data:
    """Images. Source: `digits` (scikit-learn's), or a folder with the folders train and val, in
    which each class has a folder of its images."""

    source: str = "digits"
    crop: float = least(0.08, 0.01, 1.0)  # least share of a photograph that training sees at once
    workers: int = least(8, 0)  # processes of each rank that read photographs


@dataclass(frozen=True)
class Model:
    """The sizes of a `blockshock.transformer.VisionTransformer`."""

    shape: str | None = None  # b_16, l_16 or h_14: what the sizes below are where they are null
    image: int = least(8, 1)  # height and width in pixels
    channels: int = least(1, 1)
    classes: int = least(10, 1)
    patch: int | None = least(None, 1)
    width: int | None = least(None, 1)
    depth: int | None = least(None, 1)
    heads: int | None = least(None, 1)
    hidden: int | None = least(None, 1)
    attention: str | None = None  # a method of blockshock.attention; None: the device's usual one


@dataclass(frozen=True)
class Sparse:
    """Supermasks, and how sparsity grows: `block_sparse.cubic` over a part of the steps.

    linear, conv1x1, conv: sparsity at the end, of the linear layers, the 1 x 1 and the larger
    convolutions; 0 leaves them without a mask.
    """

    linear: float = least(0.8, 0.0, 1.0)
    conv1x1: float = least(0.0, 0.0, 1.0)
    conv: float = least(0.0, 0.0, 1.0)
    block: int = least(32, 1)
    skip: list = field(default_factory=lambda: ["*.qkv", "*.out", "last_layer"])
    gradient: str = choice("masked", "masked", "through")
    fixed_mask: bool = False
    fixed_weight: bool = False
    begin: float = least(0.0, 0.0, 1.0)  # share of the steps after which sparsity grows
    end: float = least(0.5, 0.0, 1.0)  # share of the steps after which it is whole
    lr: float = least(1.0, 0.0)  # of the scores, times train.lr

    def __post_init__(self):
        if self.end < self.begin:
            raise Refused(
                f"sparse.end = {self.end:g} is before sparse.begin = {self.begin:g}; let the "
                "schedule end later"
            )
        if not all(isinstance(pattern, str) for pattern in self.skip):
            raise Refused(f"sparse.skip = {self.skip}: it takes a list of names or patterns")


@dataclass(frozen=True)
class Train:
    """The steps. Images of a step: batch x accumulate x ranks."""

    steps: int = least(1000, 1)
    batch: int = least(128, 1)  # images of one backward on one rank
    accumulate: int = least(1, 1)  # backwards of a step
    lr: float = least(1e-3, 0.0)
    min_lr: float = least(0.0, 0.0)
    warmup: int = least(100, 0)  # steps
    weight_decay: float = least(0.05, 0.0)  # of matrices; vectors, positions and scores have none
    beta1: float = least(0.9, 0.0, 1.0)
    beta2: float = least(0.999, 0.0, 1.0)
    clip: float = least(1.0, 0.0)  # the largest norm of the gradient; 0: it is not clipped
    label_smoothing: float = least(0.1, 0.0, 1.0)
    mixup: float = least(0.0, 0.0)  # alpha; 0: none
    cutmix: float = least(0.0, 0.0)  # alpha; 0: none. Where both are set, each has half the batches
    average: float = least(0.0, 0.0, 1.0)  # decay of the average of the weights; 0: none is kept
    seed: int = least(0, 0, SEEDS)
    autocast: str = choice("none", "none", "bf16")  # the weights stay float32
    compile: bool = False
    data_parallel: str = "overlapped"  # a method of blockshock.data_parallel; one rank needs none
    bucket_mib: float | None = None  # None: the method's own size
    checkpoint_every: int = least(0, 0)  # steps; 0: only the last
    evaluate_every: int = least(0, 0)  # steps; 0: only the last

    def __post_init__(self):
        schedule.check(self)


@dataclass(frozen=True)
class Log:
    """What is shown and written. The CSV is always written."""

    every: int = least(10, 1)  # steps from row to row; each row waits for the device
    tensorboard: bool = False
    wandb: str = choice("off", "off", "offline", "online")


@dataclass(frozen=True)
class Use:
    """How the trained model is held, for `evaluate` and `benchmark`."""

    storage: str = choice("bsr", *STORAGES)  # of the layers that had a mask; benchmark has all
    dtype: str = choice("float32", "float32", "bf16")
    batch: int = least(256, 1)  # images at once
    rounds: int = least(20, 1)  # of the benchmark, each of which times every storage once


@dataclass(frozen=True)
class Config:
    """All settings of a run. run: the folder of its config, log, checkpoint and results."""

    run: str = "runs/vision"
    device: str = choice("auto", "auto", "cpu", "cuda")  # auto: a GPU where torch sees one
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    sparse: Sparse = field(default_factory=Sparse)
    train: Train = field(default_factory=Train)
    log: Log = field(default_factory=Log)
    use: Use = field(default_factory=Use)


def load(name: str, settings: list[str] = ()) -> Config:
    """The config of a file (a path, or a name in `configs`), with `key=value` settings applied.

    Raises:
        Refused: no such file, an unknown key, a value of the wrong type or out of its range.
    """
    return reading.load(Config, CONFIGS, name, settings)


def from_dict(given: dict[str, Any]) -> Config:
    """The config of nested dicts, as `to_dict` gives them. Raises Refused as `load` does."""
    return reading.from_dict(Config, given)
