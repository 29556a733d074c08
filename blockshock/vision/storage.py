"""A trained model as it is used: masks folded in, and its pruned layers in a faster form."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from blockshock.block_sparse import bsr, fold, sparsify
from blockshock.block_sparse.convert import ANY
from blockshock.runs.settings import Refused
from blockshock.vision import checkpoint
from blockshock.vision import config as settings
from blockshock.vision.config import Config
from blockshock.vision.model import compiled, make

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def check(config: Config) -> None:
    """Raises Refused, before anything is trained, where `use.storage` can hold no layer."""
    storage, sparse = config.use.storage, config.sparse
    if storage == "dense":
        return
    reason = bsr.unsupported(ANY, sparse.block, None)
    if not sparse.linear:
        reason = "it holds linear layers that had a mask, and sparse.linear = 0 gives them none"
    if reason:
        raise Refused(f"use.storage = {storage}: {reason}; or set use.storage=dense")


def folded(config: Config, device: torch.device) -> tuple[nn.Module, list[str], int | None]:
    """The model of the run's checkpoint in eval and `use.dtype`, its masks folded in.

    Returns the model, the names of the layers that had a mask, and the step. The weights are the
    averaged ones, if any are kept. Without a checkpoint they are the initial ones, and the step
    None.
    """
    model, _ = make(config, device)
    step, path = None, Path(config.run)
    if (path / checkpoint.NAME).is_file():
        state = checkpoint.load(path)
        checkpoint.fits(state, settings.to_dict(config))
        model.load_state_dict(state["average"] or state["model"])
        step = state["step"]
    names = fold(model)
    return model.to(DTYPES[config.use.dtype]).eval(), names, step


def hold(
    model: nn.Module, names: list[str], storage: str, config: Config, tell: Callable[[str], None]
) -> nn.Module:
    """Puts the pruned layers into a storage, in place; tells which are, and which are left.

    Raises Refused where none can be.
    """
    if storage != "dense":
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "sparsify changed nothing")  # an error follows
                report = sparsify(
                    model,
                    lambda name, layer: name in names,
                    storage=storage,
                    block=config.sparse.block,
                    fuse=storage == "bsr",
                )
        except ValueError as error:
            raise Refused(f"use.storage = {storage}: {error}") from error
        left = {
            name: report.left.get(name, "no nn.Linear")
            for name in names
            if name not in report.replaced
        }
        if not report.replaced:
            name, reason = next(iter(left.items()), ("every layer", "none had a mask"))
            raise Refused(f"use.storage = {storage}: {name} cannot be held so: {reason}")
        tell(f"{len(report.replaced)} of {len(names)} pruned layers are now {storage}")
        for name, reason in left.items():
            tell(f"  {name} stays dense: {reason}")
    return compiled(model, config)
