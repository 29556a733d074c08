"""What a checkpoint holds: weights and optimizer state of the dense model, whole.

A data-parallel wrapper makes whole what its ranks hold of this rank's model; where that is itself a
part, tensor-parallel ranks make it whole in turn.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from blockshock.data_parallel.wrapper import Wrapper
from blockshock.transformer import TensorParallelDecoder

Named = dict[str, Any]  # by a parameter's name


def whole(model: Wrapper, optimizer: torch.optim.Optimizer) -> tuple[Named, dict]:
    """(weights, optimizer state) on the CPU, alike on all ranks. A collective."""
    if not isinstance(model.module, TensorParallelDecoder):
        return model.full_state_dict(cpu=True), model.full_optimizer_state(optimizer, cpu=True)
    gathered = partial(_gathered, model.module)
    weights = model.full_state_dict()
    weights = {n: gathered(n, v) for n, v in weights.items() if not n.endswith("_extra_state")}
    return weights, _changed(model.full_optimizer_state(optimizer), gathered)


def own_weights(module: nn.Module, weights: Named) -> Named:
    """This rank's state_dict of the dense model's."""
    parts = isinstance(module, TensorParallelDecoder)
    return module.own_state_dict(weights) if parts else weights


def put(
    model: Wrapper,
    weights: Named,
    optimizer: torch.optim.Optimizer | None = None,
    state: dict | None = None,
) -> None:
    """Takes what `whole` gave, of any number of ranks; alike on all ranks."""
    module = model.module
    model.load_full_state_dict(own_weights(module, weights))
    if optimizer is None:
        return
    if isinstance(module, TensorParallelDecoder):
        state = _changed(state, partial(_restricted, module))
    model.load_full_optimizer_state(optimizer, state)


def _changed(state: dict, change: Callable[[str, Any], Any]) -> dict:
    """An optimizer's state with change(name, value) in the place of each value."""
    entries = {
        name: {key: change(name, value) for key, value in values.items()}
        for name, values in state["state"].items()
    }
    return state | {"state": entries}


def _gathered(module: TensorParallelDecoder, name: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = module.gather({name: value})[name] if value.dim() else value
    return value.to("cpu", copy=True)  # one whole tensor at a time is on the device


def _restricted(module: TensorParallelDecoder, name: str, value: Any) -> Any:
    cut = isinstance(value, torch.Tensor) and value.dim()
    return module.restrict({name: value})[name] if cut else value
