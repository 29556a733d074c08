"""Putting another layer in the place of one in a model, and who else holds its parameters."""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from blockshock.data_parallel.wrapper import Wrapper
from blockshock.linear import extras

OR_PUT = ", or, in an optimizer, put report.parameters[old] for old"  # what else can be done


def asked_by(where: str | Callable[[str, nn.Linear], bool]) -> Callable[[str, nn.Linear], bool]:
    """Whether a layer is asked for. Raises ValueError for neither a glob nor a function."""
    if callable(where):
        return where
    if not isinstance(where, str):
        raise ValueError(
            f"where = {where!r} is neither a text nor a function; give a glob over the names of "
            "layers ('*.mlp.*') or a function of (name, layer)"
        )
    return lambda name, layer: fnmatchcase(name, where)


def users(model: nn.Module) -> Counter:
    """How many names each module, and each parameter's memory, has in the model."""
    found = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    found.update(
        place(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return found


def why_left(layer: nn.Linear, users: Counter) -> str | None:
    """Why another layer cannot stand for this one, of the model of these users, or None."""
    own = (layer, *layer._parameters.values())
    if any(users[place(one)] > 1 for one in own if one is not None):
        return "it, its weight or its bias is shared with another module"
    return extras.why_not(layer)


def place(one: nn.Module | nn.Parameter):
    """What two names of the same thing have in common; parameters may share memory alone."""
    if type(one) is nn.Parameter and one.data_ptr():
        return "at", one.data_ptr()
    return id(one)


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Sets the submodule of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def warn_of_holders(old: list[nn.Parameter], step: str, else_: str = "") -> None:
    """What `holders` names holds the old parameters of a step that has replaced them."""
    for name in holders(old):
        warnings.warn(
            f"{name} holds parameters that {step} has replaced, and not the new ones; make "
            f"it after {step}{else_}",
            stacklevel=3,
        )


def holders(parameters: list[nn.Parameter]) -> list[str]:
    """The classes of the optimizers and data-parallel wrappers that have one of these parameters.

    Any other holder is not to be told from a list.
    """
    wanted = {id(parameter) for parameter in parameters}
    if not any(_holding(wanted)):
        return []
    gc.collect()  # one that nobody uses any more is not meant
    return sorted({type(holder).__name__ for holder in _holding(wanted)})


def _holding(wanted: set[int]) -> Iterator[object]:
    """What trains one of these parameters, given by its id."""
    for one in gc.get_objects():
        if issubclass(type(one), torch.optim.Optimizer):
            groups = vars(one).get("param_groups", ())
            held = {id(p) for group in groups for p in group["params"]}
        elif issubclass(type(one), DistributedDataParallel):
            held = set(map(id, vars(one).get("_module_parameters", ())))
        elif issubclass(type(one), Wrapper):
            held = vars(one).get("stepped", set())
        else:
            continue
        if not held.isdisjoint(wanted):
            yield one
