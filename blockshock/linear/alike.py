"""What the ranks of a group must have alike, and the error where they have not.

together       a step that all ranks do, with the same facts, or none
digest         the bits of a weight as a number, for such facts
Check          x and dY of a converted layer, compared at its first calls or at every n-th one
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blockshock.distributed import collectives
from blockshock.distributed.agree import told_by_all
from blockshock.linear.split import Split

PATIENCE = 600.0  # seconds for a rank that comes late, as NCCL's own; it may read or compile first
ROUNDING = 1 / 16  # of a row's norm: bf16 rounded otherwise in many layers stays well below
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20  # words mixed at once, 8 MiB each time
_FACTORS = -7046029254386353131, -4658895280553007687  # of splitmix64 (Steele et al. 2014), signed
_FIX = "call it alike on all ranks"
_FIXES = {"bits of weight": "broadcast the model from one rank first"}
_FIXES["bits of bias"] = _FIXES["bits of weight"]


@torch.no_grad()
def digest(tensor: Tensor) -> int:
    """64 bits made of a real tensor's bits and their order, on its device; waits for the device."""
    flat = tensor.detach().contiguous().flatten()
    words = _WORDS[8 if flat.nbytes % 8 == 0 else flat.element_size()]
    if flat.storage_offset() * flat.element_size() % words.itemsize:
        flat = flat.clone()
    flat = flat.view(words)
    place = torch.arange(min(_CHUNK, len(flat)), device=flat.device).mul_(_FACTORS[0])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        mixed = flat[start : start + _CHUNK].long() + (start * _FACTORS[0] + 2**63) % 2**64 - 2**63
        mixed += place[: len(mixed)]
        mixed ^= mixed >> 32
        mixed *= _FACTORS[1]
        mixed ^= mixed >> 29
        total += mixed.sum()
    return total.item()


@contextmanager
def together(group, about: str, *, alone: bool = False) -> Iterator[dict[str, dict]]:
    """A step that all ranks do or none: `with together(group, "convert") as facts: ...`

    Gives an empty dict, for layer -> what -> value, which must be the same on all ranks at the end.
    Raises ValueError on all ranks where it is not; where one rank raises, so do the others. alone:
    no other rank takes part.
    """
    facts = {}
    try:
        yield facts
    except Exception as error:
        if not alone:
            _told({"error": f"{type(error).__name__}: {error}"}, group, about)
        raise
    ranks = [] if alone else _told({"facts": facts}, group, about)
    for rank, found in enumerate(ranks):
        if "error" in found:
            raise ValueError(f"{about} changes nothing, for rank {rank} has {found['error']}")
    for rank, found in enumerate(ranks):
        difference = _difference(ranks[0]["facts"], found["facts"], rank)
        if difference:
            raise ValueError(f"{about} changes nothing: the ranks disagree about {difference}")


def _told(own: dict, group, about: str) -> list[dict]:
    """What each rank says."""
    text = json.dumps(own, default=str)
    return [json.loads(one) for one in told_by_all(text, group, about=about, seconds=PATIENCE)]


def _difference(first: dict, other: dict, rank: int) -> str | None:
    """The first of them, and what to do."""
    for layer in (*first, *other):
        a, b = first.get(layer), other.get(layer)
        if a is None or b is None:
            lacks = 0 if a is None else rank
            return f"{layer}: rank {lacks} has none; {_FIX}"
        for name in (*a, *b):
            if a.get(name) != b.get(name):
                one, two = a.get(name, "none"), b.get(name, "none")
                seen = f"rank 0 has {one}, rank {rank} has {two}"
                return f"{layer}, {name}: {seen}; {_FIXES.get(name, _FIX)}"
    return None


def check_inputs(model: nn.Module, every: int | None = 1) -> None:
    """For debugging: the ranks compare x and dY of every converted layer, at each n-th call.

    Raises ValueError, at such a call and on all ranks, where a rank's x or dY differs from rank
    0's by more than rounding. The host waits at each: a digest, and an exchange of some ms.
    every=None is what `convert` sets: the first calls only, in training and in eval. Every rank
    must call it with the same model. A layer with `every` cannot be captured in a CUDA graph.
    Raises ValueError for an `every` below 1, and for a model without converted layers.
    """
    if every is not None and every < 1:
        raise ValueError(f"every = {every}: it must be 1 (each call), more, or None (the first)")
    layers = {name: one for name, one in model.named_modules() if isinstance(one, Split)}
    if not layers:
        raise ValueError("the model has no layer that several ranks hold; call it after `convert`")
    for name, layer in layers.items():
        layer.check = Check(name, every)


class Check:
    """Compares a layer's x, and dY, over its ranks; name: the layer's; every: as above."""

    def __init__(self, name: str, every: int | None = None):
        self.name, self.every = name, every
        self._calls: Counter[tuple[str, bool]] = Counter()

    def look(self, what: str, tensor: Tensor, layer: Split) -> None:
        """Raises ValueError, on all ranks, where they differ by more than rounding.

        what: "x" or "dY"; tensor: [B, K] or [B, N]. In a graph capture the first calls are not
        compared; with `every` it is a RuntimeError, for no replay would compare. A first dY on a
        stream of its own is not compared either: `torch.cuda.make_graphed_callables` warms up on
        one, with gradients that it leaves unwritten.
        """
        kind = what, layer.training
        if self.every is None and self._calls[kind]:
            return
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            if self.every:
                raise RuntimeError(
                    f"layer {self.name!r}: its inputs are compared every {self.every} calls, which "
                    "a CUDA graph's replay cannot do; call check_inputs(model, every=None) first"
                )
            return
        if what == "dY" and self.every is None and _on_a_stream_of_its_own(tensor):
            return
        call = self._calls[kind]
        self._calls[kind] += 1
        if call == 0 or call % self.every == 0:
            self._compare(what, tensor.detach(), layer.group)

    def _compare(self, what: str, tensor: Tensor, group) -> None:
        about = f"layer {self.name!r}"
        own = {"call": f"{what} of {about}", "shape": str(list(tensor.shape))}
        ranks = _told(own | {"digest": digest(tensor)}, group, about)
        for rank, found in enumerate(ranks):
            if found["call"] != ranks[0]["call"]:
                raise ValueError(
                    f"the ranks take other ways through the model: rank 0 is at "
                    f"{ranks[0]['call']}, rank {rank} at {found['call']}; call the same layers in "
                    "the same order"
                )
            if found["shape"] != ranks[0]["shape"]:
                seen = f"{ranks[0]['shape']} on rank 0, {found['shape']} on rank {rank}"
                raise ValueError(_not_the_same(own["call"], seen))
        if len({found["digest"] for found in ranks}) > 1:
            rows = _told({"row": _differing_row(tensor, group)}, group, about)
            for rank, found in enumerate(rows):
                if found["row"] is not None:
                    seen = f"row {found['row']} of rank {rank} is not rank 0's"
                    raise ValueError(_not_the_same(own["call"], seen))


def _not_the_same(call: str, seen: str) -> str:
    return (
        f"{call} is not the same on all ranks of its group ({seen}); give them the same batch (no "
        "DistributedSampler among them), the same weights, and the same seed for dropout"
    )


def _differing_row(tensor: Tensor, group) -> int | None:
    """The first row that is not rank 0's but for rounding, or None. A collective."""
    first = tensor.contiguous().clone()
    dist.broadcast(first.view(torch.uint8), group_src=0, group=group)
    same = (tensor == first) | (tensor.isnan() & first.isnan())
    apart = (tensor - first).masked_fill_(same, 0)
    norms = torch.linalg.vector_norm(first.nan_to_num(0, 0, 0), dim=1, dtype=_wide(tensor))
    scale = norms.clamp(min=norms.square().mean().sqrt())  # a row of next to nothing is rounding
    far = ~(torch.linalg.vector_norm(apart, dim=1, dtype=_wide(tensor)) <= ROUNDING * scale)
    return int(far.nonzero()[0]) if collectives.group_rank(group) and far.any() else None


def _on_a_stream_of_its_own(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    return torch.cuda.current_stream(tensor.device) != torch.cuda.default_stream(tensor.device)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
