"""A call on its way to the ranks, and a result on its way back."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockshock.distributed import wire


def pack(fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any], limit: float) -> bytes:
    """The call as bytes: (pickled call, where its module is found, seconds it may take).

    Raises:
        ValueError: names the part that cannot be pickled, or the limit that is not above 0.
    """
    check_timeout(limit)
    try:
        call = wire.dumps((fn, args, kwargs), "the call")
    except ValueError:
        wire.dumps(fn, f"the function {name(fn)}")
        for key, value in [*enumerate(args), *kwargs.items()]:
            wire.dumps(value, f"argument {key} of {name(fn)}")
        raise
    path = [str(Path(entry).absolute()) for entry in sys.path if isinstance(entry, str)]
    return pickle.dumps((call, path, limit))


def unpack_result(answer: bytes | bytearray) -> Any:
    """A rank's result. ValueError when this process cannot read it."""
    try:
        return pickle.loads(answer)
    except Exception as error:  # whatever the result's classes raise
        raise ValueError(
            f"a rank's result could not be read back ({type(error).__name__}: {error}); return "
            "tensors on CPU and plain data"
        ) from error


def name(fn: Callable[..., Any]) -> str:
    """How messages name a function."""
    return getattr(fn, "__qualname__", None) or repr(fn)


def check_timeout(seconds: float) -> None:
    """ValueError unless it is above 0."""
    if not seconds > 0:
        raise ValueError(f"timeout={seconds}: seconds, above 0")
