"""The settings of a run: frozen dataclasses, read from YAML, checked by one rule each.

    config = load("small", ["train.lr=3e-4", "run=runs/first"])

A file is a path, or the name of one in `blockshock/lm/configs`. It gives what differs from the
defaults below. A key is `section.name`, or `run` or `device`, which stand in no section.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockshock.runs import schedule
from blockshock.runs import settings as reading
from blockshock.runs.settings import SEEDS, Refused, choice, dump, least, to_dict

__all__ = ["CONFIGS", "Config", "Refused", "dump", "from_dict", "load", "to_dict"]

CONFIGS = Path(__file__).with_name("configs")


@dataclass(frozen=True)
class Data:
    """Text and its tokens. Source: `python`, `tinystories`, `openwebtext`, or a path."""

    source: str = "python"
    folder: str = "runs/data"  # the tokenizer and the token files
    vocabulary: int = least(4096, 257)
    validation: float = least(
        0.02, 0.0, 1.0
    )  # the share of the text; 0 only where there is a split
    max_bytes: int = least(0, 0)  # of text; 0: all of it


@dataclass(frozen=True)
class Model:
    """The sizes of a `blockshock.transformer.Decoder`; its vocabulary is the tokenizer's."""

    context: int = least(256, 2)
    width: int = least(256, 1)
    depth: int = least(4, 1)
    heads: int = least(4, 1)
    kv_heads: int | None = least(None, 1)
    hidden: int | None = least(None, 1)
    tied: bool = True
    attention: str | None = None  # a method of blockshock.attention; None: the device's usual one
    linear: str | None = None  # a method of blockshock.linear, in the projections
    tensor_parallel: int = least(1, 1)  # ranks that hold one model together
    sync: str | None = None  # their plan (blockshock.transformer.sync); None: tp

    def __post_init__(self):
        if self.sync is not None and self.tensor_parallel == 1:
            raise Refused(
                f"model.sync = {self.sync}: a plan says when tensor-parallel ranks sum, and there "
                "is one; set model.tensor_parallel to 2 or more, or leave model.sync out"
            )


@dataclass(frozen=True)
class Train:
    """The steps. Tokens of a step: context x batch x accumulate x data-parallel ranks."""

    steps: int = least(1000, 1)
    batch: int = least(16, 1)  # sequences of one backward on one rank
    accumulate: int = least(1, 1)  # backwards of a step
    lr: float = least(6e-4, 0.0)
    min_lr: float = least(6e-5, 0.0)
    warmup: int = least(100, 0)  # steps
    weight_decay: float = least(0.1, 0.0)  # of matrices; vectors have none
    beta1: float = least(0.9, 0.0, 1.0)
    beta2: float = least(0.95, 0.0, 1.0)
    clip: float = least(1.0, 0.0)  # the largest norm of the gradient; 0: it is not clipped
    seed: int = least(0, 0, SEEDS)
    autocast: str = choice("none", "none", "bf16")  # the weights stay float32
    compile: bool = False
    checkpoint_blocks: bool = False  # activations are computed again in the backward
    data_parallel: str = "overlapped"  # a method of blockshock.data_parallel; one rank needs none
    bucket_mib: float | None = None  # None: the method's own size
    checkpoint_every: int = least(0, 0)  # steps; 0: only the last
    evaluate_every: int = least(0, 0)  # steps; 0: only the last
    evaluate_batches: int = least(16, 1)  # of each rank

    def __post_init__(self):
        schedule.check(self)


@dataclass(frozen=True)
class Log:
    """What is shown and written. The CSV is always written."""

    every: int = least(10, 1)  # steps from row to row; each row waits for the device
    tensorboard: bool = False
    wandb: str = choice("off", "off", "offline", "online")
    peak_tflops: float = least(0.0, 0.0)  # for MFU; 0: the data sheet's, where the GPU is known


@dataclass(frozen=True)
class Sample:
    """The text that `sample` writes."""

    prompt: str = "def "
    tokens: int = least(200, 1)  # at most: the model's context ends it
    temperature: float = least(0.8, 0.0)  # 0: the likeliest token each time
    top_k: int = least(50, 0)  # 0: all tokens
    seed: int = least(0, 0, SEEDS)


@dataclass(frozen=True)
class Config:
    """All settings of a run. run: the folder of its config, log, checkpoint and results."""

    run: str = "runs/lm"
    device: str = choice("auto", "auto", "cpu", "cuda")  # auto: a GPU where torch sees one
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    log: Log = field(default_factory=Log)
    sample: Sample = field(default_factory=Sample)


def load(name: str, settings: list[str] = ()) -> Config:
    """The config of a file (a path, or a name in `configs`), with `key=value` settings applied.

    Raises:
        Refused: no such file, an unknown key, a value of the wrong type or out of its range.
    """
    return reading.load(Config, CONFIGS, name, settings)


def from_dict(given: dict[str, Any]) -> Config:
    """The config of nested dicts, as `to_dict` gives them. Raises Refused as `load` does."""
    return reading.from_dict(Config, given)
