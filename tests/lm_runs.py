"""A tiny run of the language-model pipeline: its text, its settings, and what it left behind."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from blockshock.lm import checkpoint

for library in ("tokenizers", "tqdm"):
    pytest.importorskip(library, reason="the extra lm is not installed")

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "device": "cpu",
    "data": {"vocabulary": 280, "validation": 0.2},
    "model": {"context": 16, "width": 16, "depth": 1, "heads": 2},
    "train": {"steps": 12, "batch": 2, "accumulate": 2, "warmup": 2, "lr": 0.01, "min_lr": 0.001},
    "log": {"every": 1},
    "sample": {"tokens": 5},
}


def write(folder, **changes):
    """A config of a tiny run in `folder`, with text beside it; returns its path.

    changes: "section__key" or "key".
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        key: dict(part) if isinstance(part, dict) else part for key, part in SETTINGS.items()
    }
    settings["run"] = str(folder / "run")
    settings["data"] |= {"source": str(folder / "text.txt"), "folder": str(folder / "data")}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            settings[section][name] = value
        else:
            settings[section] = value
    text = folder / "text.txt"
    if not text.exists():
        words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
        lines = [f"{words[i % 8]} {words[i * i % 7]} {words[i % 5]} {i % 13}\n" for i in range(500)]
        text.write_text("".join(lines))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def rows(folder):
    """The log's rows without what depends on time and memory."""
    kept = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm")
    with (folder / "run/log.csv").open(newline="") as file:
        return [tuple(row[name] for name in kept) for row in csv.DictReader(file)]


def state(folder):
    """The tensors of the last checkpoint by a name, weights and optimizer."""
    found = checkpoint.load(folder / "run")
    tensors = {f"model.{name}": value for name, value in found["model"].items()}
    for name, entries in found["optimizer"]["state"].items():
        tensors |= {f"{name}.{key}": torch.as_tensor(value) for key, value in entries.items()}
    return tensors


def assert_same_run(one, two):
    """The logs and the last checkpoints of two folders are equal to the bit."""
    assert rows(one) == rows(two)
    first, second = state(one), state(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def start(*arguments, ranks=1):
    """The command in a process of its own, by torchrun where there are several ranks."""
    program = ["-m", "blockshock.lm", *map(str, arguments)]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        program = [*launcher, *program]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "RANK", "MASTER"))}
    return subprocess.Popen(
        [sys.executable, *program],
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, seconds=120):
    """(exit code, what it printed)."""
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        raise AssertionError(f"not done after {seconds} s:\n{out}") from None
    return process.returncode, out
