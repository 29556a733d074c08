"""Files of what was measured before. They only save time: a missing, torn or foreign one is empty.

Each is one JSON object in `$BLOCKSHOCK_CACHE` (default `~/.cache/blockshock`). It is written whole,
under a lock, so that jobs which write at once lose nothing of each other's.
"""

import contextlib
import fcntl
import json
import os
import tempfile
from pathlib import Path

import torch


def folder() -> Path:
    """Where this user's files are."""
    root = os.environ.get("BLOCKSHOCK_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "blockshock"


def device_name() -> str:
    """The current GPU's, as file names carry it."""
    return torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")


def read(file: Path) -> dict:
    """What a file holds; {} where it is absent, torn, or no JSON object."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def add(file: Path, found: dict, *, replace: bool = False) -> dict:
    """Adds to a file and returns what it holds now.

    Of two values for a key the one that is there stays: of jobs that measured at once the first
    one's, so that the next run repeats this one. replace: the new one is taken. A disk that is full
    or read-only costs the measurement again, and nothing else.
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(file.parent, os.O_RDONLY)
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        there = read(file)
        merged = there | found if replace else found | there
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
            written = Path(out.name)
            stack.callback(written.unlink, missing_ok=True)  # where it was not put in place
            json.dump(merged, out, indent=1, sort_keys=True)
        written.replace(file)
        return merged
    return found
