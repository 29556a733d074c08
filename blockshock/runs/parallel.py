"""A model in the data-parallel method that the settings name."""

from typing import Protocol

from torch import nn

from blockshock.data_parallel import METHODS
from blockshock.data_parallel.wrapper import Wrapper
from blockshock.runs.settings import Refused


class Parallel(Protocol):
    """What a config's section `train` says: a method, and MiB of a bucket (None: its own)."""

    data_parallel: str
    bucket_mib: float | None


def wrapped(module: nn.Module, train: Parallel, size: int, group=None) -> Wrapper:
    """The module in its method over the `size` ranks of a group; on one rank that is `none`.

    Raises Refused for a method that is none, does not fit the ranks, or refuses the module.
    """
    name = train.data_parallel
    if name not in METHODS:
        raise Refused(f"train.data_parallel = {name!r}: use one of {', '.join(METHODS)}")
    if size > 1 and name == "none":
        raise Refused(f"train.data_parallel = none: {size} ranks would train apart; name one")
    if size == 1:
        return METHODS["none"](module)
    options = {}
    if train.bucket_mib is not None:
        options["bucket_mib"] = train.bucket_mib
    try:
        return METHODS[name](module, group=group, **options)
    except (TypeError, ValueError) as error:
        raise Refused(f"train.data_parallel = {name}, {options}: {error}") from error
