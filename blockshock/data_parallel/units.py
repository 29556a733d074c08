"""What of a module is gathered and freed together: its blocks, and the root with all the rest.

    blocks   the elements of the ModuleList that holds most parameters
    root     the module: parameters outside of the blocks, and those that two units have in common

While a unit is needed its modules have the whole parameters, else this rank's shares of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from blockshock.data_parallel.shards import Flat, Wire


@dataclass(eq=False)
class Call:
    """One forward pass of a unit.

    versions: of its shares, as autograd counts writes. full: what its backward shows to modules.
    """

    unit: Unit
    has_graph: bool = False
    versions: list[int] | None = None
    in_backward: bool = False
    full: list[Tensor] | None = None


class Unit:
    """Parameters of one submodule. They are gathered while a call needs them.

    named: the parameters by name in the whole module. compute_dtype: of gathered floating-point
    parameters; None keeps theirs.
    """

    def __init__(
        self, module: nn.Module, named: dict[str, nn.Parameter], compute_dtype, wire: Wire
    ):
        self.module, self.flats = module, []

        def kind(item):
            return str(item[1].dtype), item[1].requires_grad

        for _, same in groupby(sorted(named.items(), key=kind), key=kind):
            found = dict(same)
            dtype = next(iter(found.values())).dtype
            cast = compute_dtype if compute_dtype and dtype.is_floating_point else dtype
            self.flats.append(Flat(found, cast, wire))
        self.params = [p for flat in self.flats for p in flat.params]
        self.trained = [p for p in self.params if p.requires_grad]
        self.stack: list[Call] = []  # its forward passes that run at this moment
        self.calls: set[Call] = set()  # those that need it gathered
        self._places: list[tuple[dict, str, int]] = []  # (_parameters of a module, name, number)

    def find_places(self, root: nn.Module) -> None:
        """Remembers where modules of the whole model have its parameters."""
        number = {p: i for i, p in enumerate(self.params)}
        for module in root.modules():
            for name, p in module._parameters.items():
                if p in number:
                    self._places.append((module._parameters, name, number[p]))

    def views(self) -> list[Tensor]:
        """The whole parameters, without gradients, in the order of `params`."""
        return [view for flat in self.flats for view in flat.views]

    def whole(self, trained: Sequence[Tensor]) -> list[Tensor]:
        """The whole parameters, with these for the trained ones; without gradients if empty."""
        if not trained:
            return self.views()
        rest = iter(trained)
        return [
            next(rest) if p.requires_grad else view
            for p, view in zip(self.params, self.views(), strict=True)
        ]

    def show(self, full: list[Tensor]) -> None:
        """Modules have these as their parameters."""
        for place, name, i in self._places:
            place[name] = full[i]

    def show_as_before(self) -> None:
        """Modules have what a call in backward needs; without one, this rank's shares."""
        if not self.stack:
            full = (call.full for call in self.calls if call.in_backward)
            self.show(next(full, self.params))

    def gather(self) -> None:
        """Begins to gather what is not."""
        for flat in self.flats:
            flat.gather()

    def enter(self, call: Call) -> None:
        """The call needs the whole parameters from here on."""
        self.calls.add(call)
        self.gather()
        for flat in self.flats:
            flat.wait()

    def leave(self, call: Call) -> None:
        """The call needs them no more; they are freed unless another one does."""
        self.calls.discard(call)
        self.free_unless_needed()

    def free_unless_needed(self) -> None:
        """Frees the whole parameters, also those that were gathered ahead and not used."""
        if not self.calls:
            for flat in self.flats:
                flat.free()

    def reset(self) -> None:
        """Forgets all calls, also those that an error has ended."""
        self.stack.clear()
        self.calls.clear()
        self.show_as_before()
        self.free_unless_needed()

    def check(self) -> None:
        """Raises RuntimeError where a parameter is no longer what was sharded."""
        for flat in self.flats:
            flat.check()
        for place, name, i in self._places:
            found = place.get(name)  # a plain tensor is a whole one, left by an error
            if found is None or (isinstance(found, nn.Parameter) and found is not self.params[i]):
                raise RuntimeError(
                    f"a parameter {name!r} was replaced after it was wrapped; wrap the module again"
                )

    def versions(self) -> list[int]:
        """How often autograd has seen each share written."""
        return [p._version for p in self.params]

    def check_versions(self, before: list[int]) -> None:
        """Raises RuntimeError where a share was written since these versions."""
        names = [name for flat in self.flats for name in flat.names]
        for name, one, other in zip(names, before, self.versions(), strict=True):
            if one != other:
                raise RuntimeError(
                    f"{name!r} was modified by an inplace operation between a forward and its "
                    "backward, which needs the old values; step after the backward"
                )

    def trained_views(self) -> list[Tensor]:
        """The whole trained parameters, as tensors that autograd has not seen."""
        return [v.data for v, p in zip(self.views(), self.params, strict=True) if p.requires_grad]

    def detached(self) -> list[Tensor]:
        """The whole parameters as leaves of a graph, in the same memory."""
        return [
            view.data.requires_grad_(p.requires_grad)
            for view, p in zip(self.views(), self.params, strict=True)
        ]

    def reduce(self, gradients: list[Tensor | None]) -> None:
        """gradients: whole ones, in the order of `trained`. See `Flat.reduce`."""
        rest = list(gradients)
        for flat in self.flats:
            if flat.trained:
                flat.reduce([rest.pop(0) for _ in flat.params])


def units_of(module: nn.Module, compute_dtype: torch.dtype | None, wire: Wire) -> list[Unit]:
    """The root's unit, and one for each block that has parameters of its own."""
    blocks = _blocks(module)
    inside = {part for block in blocks for part in block.modules()}
    owner: dict[nn.Parameter, nn.Module] = {
        p: module
        for part in module.modules()
        if part not in inside
        for p in part.parameters(recurse=False)
    }
    for block in blocks:
        for p in block.parameters():
            owner[p] = module if p in owner else block
    named: dict[nn.Module, dict[str, nn.Parameter]] = {module: {}, **{b: {} for b in blocks}}
    for name, p in module.named_parameters():
        named[owner[p]][name] = p
    made = [Unit(m, own, compute_dtype, wire) for m, own in named.items() if own or m is module]
    for unit in made:
        unit.find_places(module)
    return made


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The elements of the list that holds most parameters; each must have a forward."""
    best, most = [], 0
    for found in module.modules():
        if isinstance(found, nn.ModuleList) and all(_callable(m) for m in found):
            size = sum(p.numel() for p in found.parameters())
            if size > most:  # of a list and one inside it, the outer one
                best, most = list(dict.fromkeys(found)), size
    return best


def _callable(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward
