"""Sync plans: after which sublayers of a tensor-parallel decoder the ranks sum what they have.

The sublayers are attention, MLP, attention, … : 2i and 2i + 1 are those of block i. A plan cuts
them into groups, and each group ends with one sum over the ranks. Inside a group rank r goes on
alone. With x the stream that all ranks hold where the group begins, P_r the partial output of a
sublayer without its bias b:

    kind "group"       D_r = Σ P_r,  B = Σ b  over the sublayers so far in the group
                       each sublayer reads  h_r = x + D_r + B
                       at the end           x' = x + B + Σ_r D_r
    kind "parallel"    the same, but each sublayer of the group reads x
    kind "desync"      each rank keeps a stream of its own, h_r = x at first
                       after a sublayer     h_r = h_r + P_r + b
                       after the last one   x' = 1/R Σ_r (h_r + b) + Σ_r P_r

So x and the biases count once. With one rank all plans of kinds "group" and "desync" are the dense
decoder. "desync" averages what was not summed, where "group" sums it; with a sync after every
sublayer both are tensor parallelism as usual, Σ_r P_r after each.

Backward: the gradient of the stream is summed over the ranks where a group begins, and passed on
as it is where a group ends. Norm scales and biases, which all ranks hold whole, are used on streams
that differ: their gradients are summed as well (`tensor_parallel`).

Sources: one sync a block, SPD (Kim et al., arXiv:2502.20727); "desync", Desync Residual of
Ladder-Residual (Zhang et al., arXiv:2501.06589); "parallel", GPT-J and PaLM (arXiv:2204.02311).
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from blockshock.transformer.sums import Sums

KINDS = ("group", "desync", "parallel")


@dataclass(frozen=True)
class Plan:
    """groups: of indices of sublayers, in order; a sum over the ranks ends each. kind: see above.

    Raises:
        ValueError: groups that are not consecutive sublayers of whole blocks, or an unknown kind.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    kind: str = "group"

    def __post_init__(self):
        flat = [index for group in self.groups for index in group]
        if not flat or flat != list(range(len(flat))) or len(flat) % 2 or not all(self.groups):
            raise ValueError(
                f"plan {self.name!r}, groups {self.groups}: each sublayer of each block must be "
                "in one group, in order: 0, 1, 2, … in all"
            )
        if self.kind not in KINDS:
            raise ValueError(f"plan {self.name!r}, kind = {self.kind!r}: use one of {KINDS}")

    @property
    def syncs(self) -> int:
        """Sums over the ranks in one forward."""
        return len(self.groups)

    @property
    def dense(self) -> bool:
        """Whether any number of ranks computes the dense decoder: a sum after every sublayer."""
        return all(len(group) == 1 for group in self.groups)

    @property
    def depth(self) -> int:
        """Blocks."""
        return (self.groups[-1][-1] + 1) // 2


def plan(name: str, depth: int) -> Plan:
    """The plan of a name, for a decoder of so many blocks.

    "tp"                  a sync after every sublayer, which is usual tensor parallelism
    "spd"                 one after every block
    "24", "12", "9", …    so many; also "spd12" and so on. 2 depth is "tp". Up to depth, the blocks
                          are dealt to so many groups as evenly as can be, the larger ones last:
                          with 12 blocks "9" is six single ones, then three pairs
    "selective:[0,1,5]"   after these sublayers; there is always one after the last
    "desync:NAME"         the groups of another name, of kind "desync"
    "parallel"            one after every block, whose sublayers both read its input

    Raises:
        ValueError: no such plan for this depth.
    """
    if not isinstance(name, str):
        raise ValueError(f"sync plan {name!r}: give a name, such as 'spd' or '12', or a Plan")
    if name == "parallel":
        return Plan(name, plan("spd", depth).groups, "parallel")
    if name.startswith("desync:"):
        of = plan(name.removeprefix("desync:"), depth)
        if of.kind != "group":
            raise ValueError(
                f"sync plan {name!r}: desync takes the groups of a plan of kind group; use "
                "desync:spd, desync:6 or desync:selective:[…]"
            )
        return Plan(name, of.groups, "desync")
    if name.startswith("selective:"):
        return Plan(name, _after(_listed(name, 2 * depth), 2 * depth))
    found = re.fullmatch(r"tp|spd|(?:spd)?([1-9]\d*)", name)
    if found is None:
        raise ValueError(
            f"sync plan {name!r}: use tp, spd, a number of syncs such as 12 or spd12, "
            "selective:[0,1,5], desync:NAME, or parallel"
        )
    syncs = int(found[1] or {"tp": 2 * depth, "spd": depth}[name])
    if syncs == 2 * depth:
        return Plan(name, _after(range(2 * depth), 2 * depth))
    if syncs > depth:
        raise ValueError(
            f"sync plan {name!r}: {depth} blocks have 1 to {depth} syncs, or {2 * depth}; for "
            "others name the sublayers, selective:[…]"
        )
    size, larger = divmod(depth, syncs)
    sizes = [size] * (syncs - larger) + [size + 1] * larger
    ends = [sum(sizes[: place + 1]) for place in range(syncs)]
    return Plan(name, _after([2 * end - 1 for end in ends], 2 * depth))


def _listed(name: str, sublayers: int) -> list[int]:
    try:
        found = json.loads(name.removeprefix("selective:"))
    except json.JSONDecodeError:
        found = None
    whole = isinstance(found, list) and all(type(index) is int for index in found)
    if not whole or found != sorted(set(found)) or not set(found) <= set(range(sublayers)):
        raise ValueError(
            f"sync plan {name!r}: give rising indices of sublayers, 0 to {sublayers - 1}, as in "
            "selective:[0,1,5]"
        )
    return found


def _after(syncs: Sequence[int], sublayers: int) -> tuple[tuple[int, ...], ...]:
    """Groups that end with these sublayers, and with the last one."""
    bounds = [0, *(index + 1 for index in syncs if index + 1 < sublayers), sublayers]
    return tuple(tuple(range(a, b)) for a, b in pairwise(bounds))


@dataclass(frozen=True)
class Place:
    """Where a sublayer stands in its group."""

    kind: str
    last: bool
    ranks: int


# (h_r, D_r or None, place) -> (the next sublayer's h_r, D_r). It computes P_r, and ends with
# `advance`. After the last sublayer h_r is None, and D_r is what is summed.
Step = Callable[[Tensor, Tensor | None, Place], tuple[Tensor | None, Tensor | None]]


def advance(
    h: Tensor, D: Tensor | None, partial: Tensor, bias: Tensor | None, place: Place
) -> tuple[Tensor | None, Tensor | None]:
    """What follows from a sublayer's P_r and b: (h_r, D_r). Part of a step's computation."""
    biased = h if place.kind == "parallel" or bias is None else h + bias.to(h.dtype)
    if place.kind == "desync":
        return (None, biased / place.ranks + partial) if place.last else (biased + partial, None)
    D = partial if D is None else D + partial
    if place.last:
        return None, D
    return (h if place.kind == "parallel" else biased + partial), D


def run(
    plan: Plan, x: Tensor, steps: Sequence[Step], biases: Sequence[Tensor | None], sums: Sums
) -> Tensor:
    """x [..., width], alike on all ranks, after the sublayers `steps` with their biases [width].

    The gradient of each bias is this rank's: the caller sums it (`Sums.enter`).
    """
    for group in plan.groups:
        h = entered = sums.enter(x)
        D = None
        for index in group:
            h, D = steps[index](h, D, Place(plan.kind, index == group[-1], sums.ranks))
        x = sums.leave(D)
        if plan.kind != "desync":
            x = sums.once(entered) + x
            for bias in (biases[index] for index in group if biases[index] is not None):
                x = x + sums.once(bias).to(x.dtype)
    return x
