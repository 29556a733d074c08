"""The groups of an optimizer, by the names of the parameters in them."""

from torch import Tensor, nn


def group_options(optimizer) -> list[dict]:
    """The options of an optimizer's groups, without the tensors."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def steps_of(optimizer, local: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """(name, tensor) in the order in which an optimizer numbers its tensors."""
    names = [name for group in optimizer.param_groups for name in group["names"]]
    return [(name, local[name]) for name in names if name in local]


def by_name(module: nn.Module, groups: list[dict]) -> list[tuple[list[str], dict]]:
    """(names of parameters that are not frozen, options) of each group and of the rest."""
    every = dict(module.named_parameters(remove_duplicate=False))
    first = {p: name for name, p in reversed(every.items())}  # a tied one has several names
    found, seen = [], set()
    for group in groups:
        names = []
        for name in group["names"]:
            if name not in every:
                raise ValueError(f"no parameter is named {name!r}; use names of named_parameters()")
            names.append(first[every[name]])
            if names[-1] in seen:
                raise ValueError(f"parameter {name!r} is in two groups; name it once")
            seen.add(names[-1])
        found.append((names, {k: v for k, v in group.items() if k != "names"}))
    rest = [name for name, _ in module.named_parameters() if name not in seen]
    if any(every[name].requires_grad for name in rest):
        found.append((rest, {}))
    return [([n for n in names if every[n].requires_grad], options) for names, options in found]
