"""Layers of which a rank holds a part, without a sum of their own: a sync plan has these.

    ColumnParallelLinear    y_r [..., N/R] = x w_rᵀ + b_r       w_r [N/R, K]: rows of W
    RowParallelLinear       y_r [..., N]   = x_r w_rᵀ           w_r [N, K/R]: columns of W
                            Y = Σ_r y_r + b                     b [N]: whole, added by the caller

(Megatron-LM, arXiv:1909.08053.) A backward gives dw_r and db_r, and dx of a column-parallel layer
as this rank's term of it. Weights are `PartWeight`s: the norm of such a gradient is the whole
one's, on every rank, and what needs a whole weight is refused.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockshock.distributed import collectives
from blockshock.linear.part import PartWeight


@dataclass(frozen=True)
class Rows:
    """Each of some sections of rows is dealt evenly. sections: their heights."""

    sections: tuple[int, ...]

    def unsupported(self, ranks: int) -> str | None:
        """Why so many ranks cannot hold it, or None."""
        for rows in self.sections:
            if rows % ranks:
                return f"{rows} rows are not a multiple of {ranks} ranks; use fewer ranks"
        return None

    def unlike(self, whole: Tensor) -> str | None:
        """Why a tensor cannot be the whole of such parts, or None."""
        rows = sum(self.sections)
        return None if len(whole) == rows else f"{len(whole)} rows, and the whole one has {rows}"

    def take(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """A rank's part of a matrix [N, K], or of a vector [N]."""
        return torch.cat([s.chunk(ranks)[rank] for s in whole.split(self.sections)])

    def join(self, parts: Tensor) -> Tensor:
        """The whole of the parts of all ranks, [R, N/R, …]."""
        ranks = len(parts)
        sections = parts.split([rows // ranks for rows in self.sections], dim=1)
        return torch.cat([section.flatten(0, 1) for section in sections])


@dataclass(frozen=True)
class Columns:
    """Columns are dealt evenly. width: of all of them."""

    width: int

    def unsupported(self, ranks: int) -> str | None:
        """Why so many ranks cannot hold it, or None."""
        if self.width % ranks:
            return f"{self.width} columns are not a multiple of {ranks} ranks; use fewer ranks"
        return None

    def unlike(self, whole: Tensor) -> str | None:
        """Why a tensor cannot be the whole of such parts, or None."""
        found, wanted = whole.shape[-1], self.width
        return None if found == wanted else f"{found} columns, and the whole one has {wanted}"

    def take(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """A rank's part of a matrix [N, K]."""
        return whole.chunk(ranks, dim=1)[rank].contiguous()

    def join(self, parts: Tensor) -> Tensor:
        """The whole of the parts of all ranks, [R, N, K/R]."""
        return torch.cat(tuple(parts), dim=1)


class PartLayer(nn.Module):
    """Base: parameters, of which those in `cuts` are this rank's parts.

    A state_dict says which rank's it is, and `load_state_dict` refuses another's (RuntimeError).
    """

    cuts: dict[str, Rows | Columns]
    _names: ClassVar = ("weight", "bias")

    def __init__(self, weight: Tensor, bias: Tensor | None, cuts: dict, group):
        super().__init__()
        self.cuts, self.group = cuts, group
        self.ranks, self.rank = collectives.group_size(group), collectives.group_rank(group)
        self.weight = nn.Parameter(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    def values(self, name: str) -> Tensor | None:
        """A parameter for products: a plain tensor, whose gradient is the parameter's."""
        parameter = getattr(self, name)
        return None if parameter is None else parameter.as_subclass(Tensor)

    def both(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for products."""
        return self.values("weight"), self.values("bias")

    def gather(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor of what is cut like a parameter: its gradient, say. A collective."""
        part = part.as_subclass(Tensor).detach()
        return self.cuts[name].join(collectives.all_gather(part, self.group))

    def restrict(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor that is like a parameter."""
        return self.cuts[name].take(whole.detach(), self.rank, self.ranks)

    def to_dense(self) -> Tensor:
        """The whole weight, on every rank. A collective."""
        return self.gather("weight", self.weight)

    def extra_repr(self) -> str:
        """Sizes and place."""
        return f"weight {list(self.weight.shape)}, rank {self.rank} of {self.ranks}"

    def __setattr__(self, name: str, value) -> None:
        """Whatever becomes a part is a `PartWeight`; TypeError for what shards it again."""
        if value is not None and name in self._names and name in self.cuts:
            value = PartWeight.of(value, self.group)
            value.values_only = True
        super().__setattr__(name, value)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mark()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._mark()
        return self

    def _mark(self) -> None:
        """PyTorch may have made another nn.Parameter of a part."""
        for name in self.cuts:
            setattr(self, name, getattr(self, name))

    def __deepcopy__(self, memo: dict) -> "PartLayer":
        """The copy is in the same process group, which has no copies."""
        memo[id(self.group)] = self.group
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin._mark()
        return twin

    def get_extra_state(self) -> Tensor:
        """[rank, ranks], for a state_dict."""
        return torch.tensor([self.rank, self.ranks])

    def set_extra_state(self, state: Tensor) -> None:
        """Raises RuntimeError for the state of another part."""
        if state.tolist() != [self.rank, self.ranks]:
            raise RuntimeError(
                f"the state is of rank {state[0]} of {state[1]}, the layer of rank {self.rank} of "
                f"{self.ranks}; each rank loads its own, or all load the whole model's "
                "(load_full_state_dict)"
            )


class ColumnParallelLinear(PartLayer):
    """x [..., K], alike on all ranks -> y_r [..., N/R], this rank's columns of Y.

    weight [N/R, K], bias [N/R] or None: this rank's. sections: heights of what the N rows consist
    of, each of which is dealt over the ranks: of q, k and v, for example (None: one section).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, group=None, *, sections=None):
        ranks = collectives.group_size(group)
        rows = Rows(tuple(sections or (len(weight) * ranks,)))
        super().__init__(weight, bias, _cuts(rows, bias), group)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, group=None, *, sections=None):
        """Of a whole weight [N, K] and bias [N]; they are copied.

        Raises:
            ValueError: a section that is no multiple of the ranks.
        """
        rows = Rows(tuple(sections or (len(weight),)))
        cut = taken(rows, group)
        return cls(cut(weight), None if bias is None else cut(bias), group, sections=rows.sections)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N/R]."""
        return F.linear(x, *self.both())


class RowParallelLinear(PartLayer):
    """x_r [..., K/R], this rank's columns of X -> y_r [..., N], a term of Y, without the bias.

    weight [N, K/R]: this rank's. bias [N] or None: whole, and added by the caller, once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, group=None):
        columns = Columns(weight.shape[1] * collectives.group_size(group))
        super().__init__(weight, bias, {"weight": columns}, group)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, group=None):
        """Of a whole weight [N, K] and bias [N]; they are copied.

        Raises:
            ValueError: K is no multiple of the ranks.
        """
        part = taken(Columns(weight.shape[1]), group)(weight)
        return cls(part, None if bias is None else bias.detach().clone(), group)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K/R] -> [..., N], to be summed over the ranks."""
        return F.linear(x, self.values("weight"))


def _cuts(rows: Rows, bias: Tensor | None) -> dict[str, Rows]:
    return {"weight": rows} if bias is None else {"weight": rows, "bias": rows}


def taken(cut: Rows | Columns, group):
    """A function that takes this rank's part of a whole tensor, as a copy of its own."""
    rank, ranks = collectives.group_rank(group), collectives.group_size(group)
    reason = cut.unsupported(ranks)
    if reason:
        raise ValueError(reason)
    return lambda whole: cut.take(whole.detach(), rank, ranks).clone()
