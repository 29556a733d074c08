"""Images and labels by their numbers: scikit-learn's digits, or photographs in folders.

    source = open_source(config)
    source.training(sequences)      batches (images [B, C, H, W] float32, labels int64 [B])
    source.validation(indices)      likewise

`sequences` are lists of numbers that count what training reads. They say which images a batch has,
in which order, and how each is cropped; so a run goes on with the same bits from a number.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blockshock.runs.order import Order
from blockshock.runs.settings import Refused
from blockshock.vision.config import Config

DIGITS = "digits"
FOLDERS = ("train", "val")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, by channel
RESIZE = 256 / 224  # a validation image is resized to so much of the crop from its middle

Batches = Iterator[tuple[Tensor, Tensor]]


class Source(Protocol):
    """What `open_source` gives. train, val: how many images there are."""

    classes: int
    channels: int
    train: int
    val: int

    def training(self, sequences: Iterable[list[int]]) -> Batches:
        """Batches of augmented training images, for lists of sequence numbers."""

    def validation(self, indices: Iterable[list[int]]) -> Batches:
        """Batches of validation images as they are, for lists of their indices."""


def open_source(config: Config) -> Source:
    """The images that the settings name, in the size of the model.

    Raises:
        Refused: a library or a folder that is missing; images that do not fit the model.
    """
    source = Digits(config) if config.data.source == DIGITS else Folders(config)
    for name in ("classes", "channels"):
        found, wanted = getattr(source, name), getattr(config.model, name)
        if found != wanted:
            raise Refused(
                f"model.{name} = {wanted}, and {config.data.source} has {found}; set it to that"
            )
    return source


def split(count: int, batch: int, rank: int = 0, ranks: int = 1) -> Iterator[list[int]]:
    """The indices below `count` that a rank has, in batches; the last one may be smaller.

    All ranks have batches of the same sizes: where the images do not suffice, the last ranks have
    an index of `count` or more, for nothing.
    """
    own = range(rank, -(-count // ranks) * ranks, ranks)
    for start in range(0, len(own), batch):
        yield list(own[start : start + batch])


def sequences(position: int, batch: int, rank: int = 0, ranks: int = 1) -> Iterator[list[int]]:
    """The sequence numbers of a rank's batches from `position` on, without an end."""
    while True:
        first = position + rank * batch
        yield list(range(first, first + batch))
        position += batch * ranks


class Digits:
    """1797 digits of 8 × 8 pixels, in memory; every fifth one is for validation."""

    classes, channels = 10, 1

    def __init__(self, config: Config):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise Refused(
                "data.source = digits: scikit-learn is missing; pip install 'blockshock[vision]'"
            ) from error
        if config.model.image != 8:
            raise Refused(f"model.image = {config.model.image}, and digits have 8; set it to that")
        found = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1  # 0 to 16 there
        labels = torch.tensor(found.target)
        held_out = torch.arange(len(labels)) % 5 == 0
        self._train = images[~held_out], labels[~held_out]
        self._val = images[held_out], labels[held_out]
        self.train, self.val = len(self._train[1]), len(self._val[1])
        self._order = Order(self.train, config.train.seed)

    def training(self, sequences: Iterable[list[int]]) -> Batches:
        """As `Source`, without augmentation."""
        for numbers in sequences:
            chosen = [self._order[number] for number in numbers]
            images, labels = self._train
            yield images[chosen], labels[chosen]

    def validation(self, indices: Iterable[list[int]]) -> Batches:
        """As `Source`."""
        for numbers in indices:
            images, labels = self._val
            yield images[numbers], labels[numbers]


class Folders:
    """Photographs in `<source>/train/<class>/` and `<source>/val/<class>/`, as ImageNet has them.

    Training sees a random crop, or its mirror image, resized to the model's size; validation the
    middle of the resized image. Read by processes of their own.
    """

    channels = 3

    def __init__(self, config: Config):
        try:
            from torchvision.datasets import ImageFolder
        except ImportError as error:
            raise Refused(
                f"data.source = {config.data.source}: torchvision is missing, which reads "
                "photographs; pip install 'blockshock[vision]'"
            ) from error
        found = []
        for name in FOLDERS:
            path = Path(config.data.source) / name
            try:
                found.append(ImageFolder(str(path)))
            except OSError as error:
                raise Refused(
                    f"data.source = {config.data.source}: {path} has no folders of images, one "
                    "for each class; name the folder that has train and val, or use digits"
                ) from error
        train, val = found
        if train.classes != val.classes:
            other = sorted(set(train.classes) ^ set(val.classes))
            raise Refused(
                f"data.source = {config.data.source}: train and val have other classes: "
                f"{', '.join(other[:5])}; give both the same folders"
            )
        self.classes, self.train, self.val = len(train.classes), len(train), len(val)
        self._workers = config.data.workers
        augment, middle = _transforms(config.model.image, config.data.crop)
        order = Order(self.train, config.train.seed)
        self._train = _Photographs(train, augment, order, config.train.seed)
        self._val = _Photographs(val, middle, range(self.val), 0)

    def training(self, sequences: Iterable[list[int]]) -> Batches:
        """As `Source`."""
        return self._read(self._train, sequences)

    def validation(self, indices: Iterable[list[int]]) -> Batches:
        """As `Source`."""
        return self._read(self._val, indices)

    def _read(self, photographs: "_Photographs", numbers: Iterable[list[int]]) -> Batches:
        workers = {"num_workers": self._workers, "generator": torch.Generator()}  # not the run's
        return iter(DataLoader(photographs, batch_sampler=numbers, **workers))


class _Photographs(Dataset):
    """photographs[number]: (image [3, H, W], label), augmented by that number alone."""

    def __init__(self, files: Any, transform: Any, order: Any, seed: int):
        self.files, self.transform, self.order, self.seed = files, transform, order, seed

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image, label = self.files[self.order[number]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mixed(self.seed, number))
            return self.transform(image), label


def _transforms(size: int, crop: float) -> tuple[Any, Any]:
    from torchvision.transforms import v2

    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = [v2.RandomResizedCrop(size, scale=(crop, 1.0)), v2.RandomHorizontalFlip()]
    middle = [v2.Resize(round(size * RESIZE)), v2.CenterCrop(size)]
    return v2.Compose([*augment, *to_tensor]), v2.Compose([*middle, *to_tensor])


def _mixed(seed: int, number: int) -> int:
    """A seed for one number; those of neighbours have nothing in common."""
    return (seed * 1_000_003 + number * 0x9E3779B97F4A7C15) % 2**63
