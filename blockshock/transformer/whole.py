"""What a module of `parts` does beside computing: whole tensors, and checks that all ranks make.

A module holds parts under the names that the whole tensors have in a dense module, so what is
gathered is a state_dict of that one, for any number of ranks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from blockshock.linear.alike import digest
from blockshock.transformer.parts import PartLayer

_EXTRA = "_extra_state"


class Whole(nn.Module):
    """Base of modules whose layers are parts: whole weights and gradients, in and out."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """The state_dict of the dense module with these weights, on every rank. A collective."""
        return self.gather({n: t for n, t in self.state_dict().items() if not n.endswith(_EXTRA)})

    def load_full_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes this rank's part of a dense module's state_dict; RuntimeError as PyTorch's."""
        self.load_state_dict(self.own_state_dict(state))

    def own_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `state_dict` would be, were a dense module's whole state in this one."""
        extra = {n: t for n, t in self.state_dict().items() if n.endswith(_EXTRA)}
        return self.restrict(state) | extra

    def gather_gradients(self) -> dict[str, Tensor]:
        """The dense gradients by name, of parameters that have one. A collective."""
        named = self.named_parameters()
        return self.gather({name: p.grad for name, p in named if p.grad is not None})

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of such as are cut like the parameters of their names. A collective."""
        cuts = dict(self._cuts())
        return {
            n: cuts[n][0].gather(cuts[n][1], t) if n in cuts else t.detach()
            for n, t in tensors.items()
        }

    def restrict(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of whole tensors, by the names of the parameters that they are like.

        RuntimeError for a tensor of another size than the whole parameter.
        """
        cuts = dict(self._cuts())
        for name, (layer, own) in cuts.items():
            reason = name in tensors and layer.cuts[own].unlike(tensors[name])
            if reason:
                raise RuntimeError(f"{name}: {reason}")
        return {
            n: cuts[n][0].restrict(cuts[n][1], t) if n in cuts else t for n, t in tensors.items()
        }

    def _cuts(self) -> Iterator[tuple[str, tuple[PartLayer, str]]]:
        """(a parameter's whole name, (its layer, its name there)) of what is in parts."""
        for name, layer in self.named_modules():
            if isinstance(layer, PartLayer):
                for own in layer.cuts:
                    yield f"{name}.{own}", (layer, own)


def check_even(ranks: int, **sizes: int) -> None:
    """Raises ValueError for a size that so many ranks cannot hold in equal parts."""
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(
                f"{name} = {size} is not a multiple of {ranks} ranks, which hold equal parts; "
                "change it, or use fewer ranks"
            )


def told(facts: dict[str, object], generator: torch.Generator | None) -> dict[str, str]:
    """What ranks that make a module must have in common, for `linear.alike.together`."""
    seed = digest((generator or torch.default_generator).get_state())
    texts = {name: str(value) for name, value in facts.items()}
    return {**texts, "the generator's state": f"digest {seed:x}"}
