"""Weights given by row blocks, so that no rank ever holds the whole of W [N, K].

A source has shape (N, K), dtype, device, and rows(start, stop) -> [stop-start, K]: a fresh tensor
on the device, the caller's own. A source can be pickled, so it can be handed to ranks.

Seeded values are drawn in float32 and rounded once: a weight in bf16 is the weight in fp32,
rounded. Each 256-row chunk has a generator of its own, so the bits depend neither on the block
boundaries nor on the number of ranks, nor on N. They do depend on the device: the generators of
the CPU and of CUDA differ, and CUDA's deal their stream out by the size of the GPU.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from blockshock.masks import check_finite

CHUNK = 256
STORED = {  # what a file may hold: safetensors' names
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class WeightSource(Protocol):
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def rows(self, start: int, stop: int) -> Tensor: ...


def generator(
    device: torch.device | str, purpose: str, seed: int, index: int = 0
) -> torch.Generator:
    """A torch.Generator on device for part `index` of what `purpose` and `seed` name.

    Two purposes, or two seeds, share no stream (torch's CPU generator tells 2^32 seeds apart: the
    chance that two parts of two streams meet is 1 in 2^32); the parts of one stream never meet,
    for their seeds are consecutive.
    """
    digest = hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") + index)


class SeededWeight:
    """Normal weights of standard deviation scale (default K**-0.5), never held as a whole."""

    def __init__(
        self,
        N: int,
        K: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int,
        scale: float | None = None,
    ):
        self.shape = (N, K)
        self.dtype = dtype
        self.device = torch.device(device)
        self.seed = seed
        self.scale = K**-0.5 if scale is None else scale

    def rows(self, start: int, stop: int) -> Tensor:
        _check_range(start, stop, self.shape[0])
        out = torch.empty(stop - start, self.shape[1], dtype=self.dtype, device=self.device)
        for chunk in range(start // CHUNK, -(-stop // CHUNK)):
            first = chunk * CHUNK
            low, high = max(start, first), min(stop, first + CHUNK)
            drawn = torch.randn(
                CHUNK,
                self.shape[1],
                generator=generator(self.device, "weight", self.seed, chunk),
                device=self.device,
            ).mul_(self.scale)
            out[low - start : high - start] = drawn[low - first : high - first]
        return out


class TensorWeight:
    """A weight that is there already, [N, K]. rows() raises ValueError where it is not finite."""

    def __init__(self, tensor: Tensor):
        if tensor.ndim != 2:
            raise ValueError(f"a weight of shape {tuple(tensor.shape)}: a weight is [N, K]")
        self.tensor = tensor.detach()
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype
        self.device = tensor.device

    def rows(self, start: int, stop: int) -> Tensor:
        _check_range(start, stop, self.shape[0])
        rows = self.tensor[start:stop].clone(memory_format=torch.contiguous_format)
        check_finite(rows, start=start)
        return rows


class FileWeight:
    """A weight [N, K] in a .safetensors or .npy file, read by row blocks.

    Args:
        path, name: as for FileTensor.
        dtype: what rows() gives; the file's own if None.
        device: where rows() puts them.

    Raises:
        ValueError: as FileTensor; a tensor that is not 2-D; in rows(), values not finite in dtype.
    """

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ):
        self.file = FileTensor(path, name)
        if len(self.file.shape) != 2:
            raise ValueError(f"{self.file} has shape {self.file.shape}: a weight is [N, K]")
        self.shape = self.file.shape
        self.dtype = dtype or self.file.dtype
        self.device = torch.device(device)

    def rows(self, start: int, stop: int) -> Tensor:
        _check_range(start, stop, self.shape[0])
        rows = self.file.read(start, stop).to(self.device, self.dtype)
        check_finite(rows, start=start, what=str(self.file))
        return rows


def as_source(weight: Tensor | WeightSource) -> WeightSource:
    """A tensor [N, K] as a source; a source as it is."""
    if isinstance(weight, Tensor):
        return TensorWeight(weight)
    if all(hasattr(weight, name) for name in ("shape", "dtype", "device", "rows")):
        return weight
    raise ValueError(
        f"a {type(weight).__name__} is no weight: give a tensor [N, K] or a source with "
        "shape, dtype, device and rows(start, stop)"
    )


def seeded_bias(N: int, *, dtype: torch.dtype, device: torch.device | str, seed: int) -> Tensor:
    """Bias [N] of standard normal values: as large as the outputs of a SeededWeight on gaussian
    input, so that a bias that is lost or added twice cannot hide below a tolerance."""
    drawn = torch.randn(N, generator=generator(device, "bias", seed), device=device)
    return drawn.to(dtype)


def row_blocks(N: int, block: int = 1024) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks of at most `block` rows that cover N rows."""
    if block < 1:
        raise ValueError(f"blocks of {block} rows: a block has at least 1 row")
    for start in range(0, N, block):
        yield start, min(start + block, N)


class FileTensor:
    """One tensor of a .safetensors or .npy file, read lazily along its first dimension.

    Args:
        path: the file; its suffix says the format.
        name: which tensor of a .safetensors file; may be left out where there is only one. A .npy
            file holds one array and takes no name.

    Raises:
        ValueError: no such file, another suffix, a file that cannot be read, a wrong or missing
            name (the message lists the tensors), values that are not 16, 32 or 64 bit floats.
        ImportError: a .safetensors file without the safetensors library.
    """

    def __init__(self, path: str | Path, name: str | None = None):
        self.path = Path(path)
        self.name = name
        if self.path.suffix not in (".safetensors", ".npy"):
            raise ValueError(f"{self.path}: weights are read from .safetensors or .npy files")
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file; give the path of a file on this machine")
        if self.path.suffix == ".npy":
            if name is not None:
                raise ValueError(f"name {name!r}: a .npy file holds one array; leave the name out")
            array = self._array()
            self.shape, stored = tuple(array.shape), f"F{8 * array.dtype.itemsize}"
            stored = stored if array.dtype.kind == "f" else str(array.dtype)
        else:
            with self._safetensors() as file:
                self.name = _one_name(self.path, list(file.keys()), name)
                part = file.get_slice(self.name)
                self.shape, stored = tuple(part.get_shape()), part.get_dtype()
        if stored not in STORED or not self.shape:
            raise ValueError(
                f"{self} is {stored} of shape {self.shape}: what is read is a tensor of "
                f"{', '.join(STORED)}; convert it first"
            )
        self.dtype = STORED[stored]

    def __str__(self) -> str:
        return str(self.path) if self.name is None else f"{self.path}:{self.name}"

    def read(self, start: int, stop: int) -> Tensor:
        """[stop-start, *shape[1:]] of the file's dtype on the CPU; nothing else is read."""
        if self.path.suffix == ".npy":
            part = self._array()[start:stop]
            return torch.from_numpy(part.astype(part.dtype.newbyteorder("="), order="C"))
        with self._safetensors() as file:
            return file.get_slice(self.name)[start:stop]

    def _array(self):
        import numpy

        try:
            return numpy.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read as .npy: {error}") from error

    def _safetensors(self):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError(
                f"{self.path} needs the safetensors library: pip install 'blockshock[files]'"
            ) from error
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: no room to map it
            raise ValueError(f"{self.path} cannot be read as .safetensors: {error}") from error


def _one_name(path: Path, names: list[str], name: str | None, listed: int = 40) -> str:
    if name in names:
        return name
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        problem, near = f"it holds {len(names)} tensors, and none was named", sorted(names)
    else:
        problem = f"it holds no tensor {name!r}"
        near = difflib.get_close_matches(name, names, n=max(len(names), 1), cutoff=0.0)
    more = f" and {len(names) - listed} more" if len(names) > listed else ""
    raise ValueError(f"{path}: {problem}; choose one of {', '.join(near[:listed])}{more}")


def _check_range(start: int, stop: int, N: int) -> None:
    if not 0 <= start <= stop <= N:
        raise ValueError(f"rows {start} to {stop}: the weight has rows 0 to {N}")
