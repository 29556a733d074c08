"""What was fastest where: measured tables behind kernel="auto" and reduce="auto".

A table is a JSON file a GPU: `measured/<GPU>.json` in the package, and before it the one in
`$BLOCKSHOCK_CACHE` (default `~/.cache/blockshock`), which `python -m blockshock.tune` writes. Of
the measured sizes the nearest one (by the sum of the ratios' logarithms) stands for those asked
for.

    products   {N, K, B, dtype, mask, kernel, seconds: {kernel: s}}     K: columns of W
    sums       {ranks, N, K, B, dtype, how, chunks, seconds: {way: s}}  K: columns of x on a rank
"""

import json
import math
import os
from functools import lru_cache
from pathlib import Path

import torch

SHIPPED = Path(__file__).parent / "measured"


def folder() -> Path:
    """Where this user's measured choices are kept."""
    root = os.environ.get("BLOCKSHOCK_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "blockshock"


def device_name() -> str:
    """The current GPU's, as file names carry it."""
    return torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")


def file_name() -> str:
    """The name of the current GPU's table."""
    return f"{device_name()}.json"


def fastest_product(**wanted) -> str | None:
    """The kernel for N, K, B, dtype and mask (a kind of `kernels.products`), or None: not known.

    What was measured in bf16 stands for fp16 as well, where that was not.
    """
    found = _nearest("products", wanted)
    return None if found is None else found["kernel"]


def fastest_sum(**wanted) -> dict | None:
    """The entry for ranks, N, K, B and dtype: `how` and `chunks`; None: not known."""
    return _nearest("sums", wanted)


def forget() -> None:
    """Reads the tables again when they are next asked."""
    _table.cache_clear()


def _nearest(kind: str, wanted: dict) -> dict | None:
    name = str(wanted["dtype"]).removeprefix("torch.")
    found = _nearest_of(kind, wanted | {"dtype": name})
    if found is None and name == "float16":  # as many bytes, and the same rates
        found = _nearest_of(kind, wanted | {"dtype": "bfloat16"})
    return found


def _nearest_of(kind: str, wanted: dict) -> dict | None:
    fixed = {key: value for key, value in wanted.items() if key not in SIZES}
    entries = [
        entry
        for entry in _table()[kind]
        if all(entry.get(key) == value for key, value in fixed.items())
    ]

    def distance(entry: dict) -> float:
        return sum(abs(math.log2(entry[size] / wanted[size])) for size in SIZES)

    return min(entries, key=distance, default=None)


@lru_cache(maxsize=1)
def _table() -> dict[str, list[dict]]:
    """The user's entries before the shipped ones, so that of equals the user's are taken."""
    tables = [read(place / file_name()) for place in (folder(), SHIPPED)]
    return {kind: [entry for table in tables for entry in table[kind]] for kind in KINDS}


SIZES = ("N", "K", "B")
KINDS = {
    "products": {"N", "K", "B", "dtype", "mask", "kernel"},
    "sums": {"ranks", "N", "K", "B", "dtype", "how", "chunks"},
}


def read(file: Path) -> dict[str, list[dict]]:
    """A table; empty where the file is absent or damaged, as it only saves time."""
    try:
        found = json.loads(file.read_text())
        return {
            kind: [entry for entry in found.get(kind, []) if _complete(entry, needed)]
            for kind, needed in KINDS.items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {kind: [] for kind in KINDS}


def _complete(entry: dict, needed: set[str]) -> bool:
    sizes = [entry.get(size) for size in SIZES]
    return needed <= entry.keys() and all(isinstance(size, int) and size > 0 for size in sizes)
