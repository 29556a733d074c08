"""A tiny run of the vision pipeline on made-up images: its settings, and what it left behind."""

import csv

import pytest
import torch
import yaml

from blockshock.runs.order import Order
from blockshock.vision import checkpoint, data

pytest.importorskip("tqdm", reason="the extra vision is not installed")

SETTINGS = {
    "device": "cpu",
    "model": {
        "image": 8,
        "channels": 1,
        "classes": 3,
        "patch": 4,
        "width": 32,
        "depth": 2,
        "heads": 2,
        "hidden": 64,
    },
    "sparse": {"linear": 0.5, "block": 16, "end": 0.5},
    "train": {
        "steps": 8,
        "batch": 4,
        "accumulate": 2,
        "warmup": 2,
        "lr": 0.01,
        "average": 0.9,
        "mixup": 0.2,
        "cutmix": 1.0,
    },
    "log": {"every": 1},
    "use": {"batch": 16, "rounds": 2},
}


class Made:
    """Images whose class is where they are bright; 48 for training, 19 for validation."""

    classes, channels, train, val = 3, 1, 48, 19

    def __init__(self, config):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(self.train + self.val) % 3
        self.images = torch.randn(len(self.labels), 1, 8, 8, generator=generator) / 4
        self.images[torch.arange(len(self.labels)), 0, 2 * self.labels + 1] += 2
        self.order = Order(self.train, config.train.seed)

    def training(self, sequences):
        """As `data.Source`."""
        for numbers in sequences:
            chosen = [self.order[number] for number in numbers]
            yield self.images[chosen], self.labels[chosen]

    def validation(self, indices):
        """As `data.Source`."""
        for numbers in indices:
            chosen = [self.train + number for number in numbers]
            yield self.images[chosen], self.labels[chosen]


def use_made(monkeypatch):
    """Every run reads these images."""
    monkeypatch.setattr(data, "open_source", Made)


def write(folder, **changes):
    """A config of a tiny run in `folder`; returns its path. changes: "section__key" or "key"."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        key: dict(part) if isinstance(part, dict) else part for key, part in SETTINGS.items()
    }
    settings["run"] = str(folder / "run")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            settings[section][name] = value
        else:
            settings[section] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def rows(folder):
    """The log's rows without what depends on time and memory."""
    left = ("images_per_s", "seconds", "memory_mib")
    with (folder / "run/log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in left} for row in csv.DictReader(file)]


def state(folder):
    """The tensors of the last checkpoint by a name: weights, their average, optimizer."""
    found = checkpoint.load(folder / "run")
    tensors = {f"{part}.{k}": v for part in ("model", "average") for k, v in found[part].items()}
    for name, entries in found["optimizer"]["state"].items():
        tensors |= {f"{name}.{key}": torch.as_tensor(value) for key, value in entries.items()}
    return tensors


def assert_same_run(one, two):
    """The logs and the last checkpoints of two folders are equal to the bit."""
    assert rows(one) == rows(two)
    first, second = state(one), state(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
