"""What every layer of several ranks is: a part of a dense layer, which says so wherever it goes."""

import copy
import json
import zlib
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockshock.distributed import agree, collectives
from blockshock.linear.part import PartGradient, PartWeight, check_bias


class Split(nn.Module):
    """A layer [N, K] of which this rank holds a part. weight: that part; bias [N]: whole.

    A state_dict carries, besides these, what it is a part of. `load_state_dict` refuses a state
    that is another part, or none, with RuntimeError, also where it is not strict.
    """

    method: ClassVar[str]  # its name in `METHODS`
    check = None  # an `alike.Check` of x and dY, in a converted model

    def __init__(self, part: Tensor, bias: Tensor | None, N: int, K: int, group):
        super().__init__()
        self.out_features, self.in_features, self.group = N, K, group
        self.weight = nn.Parameter(part)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.ranks, self.rank = collectives.group_size(group), collectives.group_rank(group)

    def __deepcopy__(self, memo: dict) -> "Split":
        """The copy is in the same process group, which has no copies."""
        memo[id(self.group)] = self.group
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __setattr__(self, name: str, value) -> None:
        """Whatever becomes the weight is a `PartWeight` of the layer's group.

        Raises TypeError for what fully_shard puts there, and for a bias that it averages over ranks
        over which it cannot average the weight; ValueError for a weight of another shape.
        """
        if name == "weight":
            own = self._parameters.get("weight")
            if own is not None and getattr(value, "shape", own.shape) != own.shape:
                raise ValueError(
                    f"a weight {list(value.shape)} for a layer whose part is {list(own.shape)}; "
                    "tie or replace weights before `convert`, which leaves shared layers"
                )
            value = PartWeight.of(value, self.group)
        elif name == "bias":
            check_bias(value, self.group)
        super().__setattr__(name, value)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.weight = self.weight

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.weight = self.weight  # PyTorch may have made another nn.Parameter of it
        return self

    @property
    def part(self) -> Tensor:
        """The weight's values, for products, which do not write them."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.weight.detach()

    @property
    def added(self) -> Tensor | None:
        """The bias's values in the products' dtype [N]."""
        return None if self.bias is None else self.bias.detach()

    def written(self) -> tuple[int, int, object]:
        """Another one after each write to the weight that PyTorch counts, or may not have counted.

        A weight that was made in inference mode counts none: it becomes an ordinary one. A plain
        tensor, which functional_call puts there, counts as written at each call: it may lie where
        the last call's tensor was.
        """
        if self.weight.is_inference():
            with torch.inference_mode(False):
                values, trained = self.weight.clone(), self.weight.requires_grad
                self.weight = nn.Parameter(values, requires_grad=trained)
        lent = getattr(self.weight, "lent", object())
        return self.weight._version, self.weight.data_ptr(), lent

    def mask_state(self) -> dict[str, Tensor]:
        """The mask by its name, one byte an entry; {} where none is kept as a tensor."""
        return {}

    def mask_digests(self) -> list[int]:
        """What tells its masks from others."""
        return [_digest(mask) for mask in self.mask_state().values()]

    def of_first_term(self, mask: Tensor) -> Tensor:
        """What a mask of this term says of the pair's first one."""
        return mask

    def prepare_gradients(self) -> None:
        """Called before the products of a backward: nothing to do."""

    def as_part(self, gradient: Tensor) -> PartGradient:
        """A gradient of the weight, which knows that it is a part's."""
        return PartGradient.of(gradient, self.group)

    def part_of(self) -> dict[str, str | int]:
        """What the weight is a part of. Only a state that says the same can be loaded."""
        return {"method": self.method, "rank": self.rank, "ranks": self.ranks}

    def get_extra_state(self) -> Tensor:
        """`part_of` and the mask, for a state_dict: uint8, so that what copies tensors copies it.

        A line of JSON, then the mask's bytes, on the layer's device.
        """
        masks = self.mask_state().values()
        told = self.part_of() | {"digest": self.mask_digests()}
        line = torch.frombuffer(bytearray(json.dumps(told).encode() + b"\n"), dtype=torch.uint8)
        bytes_of = [mask.view(torch.uint8).flatten() for mask in masks]
        return torch.cat([line.to(self.weight.device), *bytes_of])

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the mask of a state that was found to be of this part, if it is another one."""
        _, masks = self._read(state)
        for own, mask in zip(self.mask_state().values(), masks, strict=True):
            if not torch.equal(own.cpu(), mask):
                own.copy_(mask)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        if f"{prefix}weight" in state:
            problem = self._refused(state.get(f"{prefix}_extra_state"))
            if problem:
                errors.append(f"{prefix.rstrip('.') or 'the layer'}: {problem}")
                return
        with torch.inference_mode(False):
            super()._load_from_state_dict(
                state, prefix, metadata, strict, missing, unexpected, errors
            )
        self.weight = self.weight  # as in `_apply`

    def _refused(self, state: Tensor | None) -> str | None:
        """Why the ranks' states are not those of this layer, alike on all ranks, or None."""
        problem, pair = self._another(state), []
        if problem is None:
            pair = [_digest(self.of_first_term(mask)) for mask in self._read(state)[1]]
        about = "load_state_dict of a layer that several ranks hold"
        texts = agree.told_by_all(json.dumps([problem, pair]), self.group, about=about)
        told = [json.loads(text) for text in texts]
        for rank, (found, of_pair) in enumerate(told):
            if found:
                return f"rank {rank}: {found}"
            if of_pair != told[rank - rank % 2][1]:
                return (
                    f"ranks {rank - 1} and {rank} hold terms of different masks; save both at once"
                )
        return None

    def _another(self, state: Tensor | None) -> str | None:
        """Why a state is none of this part, or None."""
        try:
            told, masks = self._read(state)
        except (ValueError, AttributeError, TypeError):
            return (
                "the state does not say which part of the weight it holds, as a dense layer's; "
                "load that before `convert`, or between `revert` and `convert`"
            )
        own = self.part_of()
        if any(told.get(name) != value for name, value in own.items()):
            return (
                f"the state is {_named(told)}, the layer is {_named(own)}; each rank saves and "
                "loads its own (`blockshock.linear.checkpoint`), or save the reverted model"
            )
        if told.get("digest") != [_digest(mask) for mask in masks]:
            return "the state's mask was changed after it was saved; save it again"
        return None

    def _read(self, state: Tensor) -> tuple[dict, list[Tensor]]:
        """What `get_extra_state` wrote. Raises ValueError for anything else."""
        line, _, rest = state.cpu().numpy().tobytes().partition(b"\n")
        own = list(self.mask_state().values())
        told = json.loads(line)
        if not isinstance(told, dict) or len(rest) != sum(mask.numel() for mask in own):
            raise ValueError("no state of this layer")
        flat = torch.frombuffer(bytearray(rest), dtype=torch.uint8) if rest else None
        return told, [flat.view(mask.dtype).view(mask.shape) for mask in own]


def _named(part: dict) -> str:
    said = f"rank {part.get('rank')} of {part.get('ranks')} of {part.get('method')}"
    return said + (f" {part['mask']}" if "mask" in part else "")


def _digest(mask: Tensor) -> int:
    return zlib.crc32(mask.cpu().contiguous().view(torch.uint8).numpy())
