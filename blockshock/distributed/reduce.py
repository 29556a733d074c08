"""Ways to sum the ranks' partial products, and which one is taken.

    Y = Σ_r P_r,   P_r = product_r(X) [B, N];   every rank gets the same bits

    collective   the backend's all_reduce, after the product
    two_shot     PyTorch's symmetric-memory kernel (reduce-scatter, all-gather), after the product
    exchange     through the other ranks' memory, in one kernel for small messages, else hidden: the
                 rows of X are cut in chunks, and each chunk's partial travels by the copy engine
                 while the next one is multiplied

With two ranks the partials of a chunk cross and both add them. With R > 2 each rank sums an R-th of
a chunk's rows, in the order of the ranks in float32, and sends the sum to all others. "auto" takes
what was fastest in a measured table (`choices`). Where the ranks cannot write each other's memory
the sum is `collective`, and the plan says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from blockshock import choices
from blockshock.distributed import collectives, symmetric
from blockshock.kernels import add
from blockshock.measure.regions import region

Fill = Callable[[int, int], None]
SUMS = ("auto", "collective", "two_shot", "exchange")
MAX_CHUNKS = 8


@dataclass(frozen=True)
class Plan:
    """One way, settled. chunks: of an exchange, 0 in one kernel; reason: why not as asked."""

    how: str
    chunks: int = 0
    reason: str = ""

    def __str__(self) -> str:
        if self.how != "exchange":
            return self.how + (f" ({self.reason})" if self.reason else "")
        ways = {0: "in one kernel", 1: "in one piece"}
        text = f"exchange, {ways.get(self.chunks, f'{self.chunks} chunks')}"
        return text + (f" ({self.reason})" if self.reason else "")


class Pending:
    """A result on its way. `wait` must be called, in the stream that began it."""

    def __init__(self, result: Tensor, finish: Callable[[], None] | None = None, held=()):
        self._result, self._finish, self._held = result, finish, held

    def wait(self) -> Tensor:
        """The result; the time that was not hidden is a region `allreduce`."""
        if self._finish is not None:
            with region("allreduce", bytes=self._result.nbytes):
                self._finish()
        self._held = ()
        return self._result


def unsupported(how: str, dtype: torch.dtype, device_type: str) -> str | None:
    """Why a way cannot be asked for, or None."""
    if how not in SUMS:
        return f"unknown sum {how!r}; use one of {', '.join(SUMS)}"
    if how in ("two_shot", "exchange") and device_type != "cuda":
        return f"the sum {how!r} needs GPUs that reach each other's memory; use 'collective'"
    if how == "two_shot" and dtype not in (torch.bfloat16, torch.float32):
        return "the sum 'two_shot' takes bf16 or fp32; use 'exchange' or 'collective'"
    return None


def plan(how: str, rows: int, columns: int, depth: int, dtype, device, group=None) -> Plan:
    """The way for partials [rows, columns] whose products sum over `depth` columns of X.

    A collective on first use; alike on all ranks, as the table is read by the group's first one.
    """
    ranks = collectives.group_size(group)
    if ranks == 1 or how == "collective" or rows == 0:
        return Plan("collective")
    if device.type != "cuda":
        return Plan("collective", reason="the ranks have no GPUs")
    key = (how, rows, columns, depth, dtype, group)
    if key not in _plans:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"no sum over ranks is planned yet for {rows} x {columns} and a graph is being "
                "captured; run this shape once before the capture"
            )
        agreed = [_plan(how, rows, columns, depth, dtype, ranks, group)]
        dist.broadcast_object_list(agreed, group=group, group_src=0)
        _plans[key] = agreed[0]
    return _plans[key]


_plans: dict[tuple, Plan] = {}


def _plan(how: str, rows: int, columns: int, depth: int, dtype, ranks: int, group) -> Plan:
    if problem := symmetric.why_not(group):
        return Plan("collective", reason=f"no {how}: {problem}")
    size = rows * columns * dtype.itemsize
    vectors = columns * dtype.itemsize % 16 == 0  # what the one kernel moves
    if how == "two_shot":
        return Plan("two_shot")
    # What travels is bytes: the 16-bit types have one table.
    name = "bfloat16" if dtype.itemsize == 2 else str(dtype).removeprefix("torch.")
    found = choices.fastest_sum(ranks=ranks, N=columns, K=depth, B=rows, dtype=name)
    if how == "auto" and (found is None or found["how"] != "exchange"):
        reason = "" if found else "no sum was measured on this GPU: python -m blockshock.tune"
        name = found["how"] if found else "collective"
        if unsupported(name, dtype, "cuda"):
            return Plan("collective", reason=f"{name} was faster in another dtype")
        return Plan(name, reason=reason)
    # A chunk of less than 512 rows does not fill the processors.
    chunks = found["chunks"] if found and found["how"] == "exchange" else min(4, rows // 512)
    if size > symmetric.PUSH_BYTES or not vectors:
        chunks = max(chunks, 1)
    return Plan("exchange", min(chunks, MAX_CHUNKS, max(1, rows // ranks)))


def begin_sum(
    product: Callable[[Tensor], Tensor],
    x: Tensor,
    chosen: Plan,
    group=None,
    *,
    hide: bool = False,
    fill: Fill | None = None,
) -> Pending:
    """Starts Σ_r product(x) over the ranks; product takes some rows of x.

    hide: whether the caller has other work to do before it waits. fill(start, stop) writes these
    rows of x, which must be done before they are multiplied; an exchange hides it as well.
    """
    if chosen.how == "exchange" and chosen.chunks:
        return _exchange(product, x, 1 if hide else chosen.chunks, group, hide, fill)
    if fill is not None:
        fill(0, len(x))
    partial = product(x)
    if collectives.group_size(group) == 1:
        return Pending(partial)
    partial = collectives.fix_layout(partial)
    if partial.numel() == 0:
        return Pending(partial)
    if chosen.how == "exchange":
        total = torch.empty_like(partial)
        with region("allreduce", bytes=partial.nbytes):
            symmetric.push(group).sum(partial, total)
        return Pending(total)
    if chosen.how == "two_shot":
        with region("allreduce", bytes=partial.nbytes):
            return Pending(symmetric.two_shot(partial.nbytes + 4096, group).sum(partial))
    if hide:
        work = dist.all_reduce(partial, group=group, async_op=True)
        return Pending(partial, work.wait)
    return Pending(collectives.all_reduce(partial, group))


@dataclass
class Streams:
    """Beside the caller's: one sends partials, one finishes chunks, one fills the rows to come and
    publishes sums.

    With priority, so that their small kernels need not wait for the end of a product.
    """

    send: torch.cuda.Stream
    finish: torch.cuda.Stream
    publish: torch.cuda.Stream

    def all(self) -> tuple[torch.cuda.Stream, ...]:
        """The three."""
        return self.send, self.finish, self.publish

    def fork(self) -> torch.cuda.Stream:
        """Makes them wait for the caller's stream, which is returned."""
        main = torch.cuda.current_stream()
        for stream in self.all():
            stream.wait_stream(main)
        return main

    def join(self, main: torch.cuda.Stream) -> None:
        """Makes the caller's stream wait for them."""
        for stream in self.all():
            main.wait_stream(stream)


_streams: dict[int, Streams] = {}


def streams() -> Streams:
    """The current device's."""
    device = torch.cuda.current_device()
    if device not in _streams:
        _streams[device] = Streams(*(torch.cuda.Stream(priority=-1) for _ in range(3)))
    return _streams[device]


def _exchange(product, x: Tensor, chunks: int, group, hide: bool, fill) -> Pending:
    bounds = [len(x) * c // chunks for c in range(chunks + 1)]
    side, ranks = streams(), collectives.group_size(group)
    main, partials, gather = side.fork(), [], []
    y = box = last = None
    filled = _fill(fill, bounds, side)
    for channel, (start, stop) in enumerate(pairwise(bounds), 1):
        if start in filled:
            main.wait_event(filled[start])
        partial = collectives.fix_layout(product(x[start:stop]))
        partials.append(partial)  # held until the streams have joined
        if y is None:
            y = partial.new_empty(len(x), partial.shape[1])
            row = y.shape[1] * y.element_size()
            box = symmetric.mailbox(2 * y.nbytes + chunks * ranks * row, group)
            with torch.cuda.stream(side.send):
                box.open()
        small = partial.nbytes <= symmetric.PUSH_BYTES and row % 16 == 0
        if ranks == 2 and stop == len(x) and not hide and small:
            # Nothing is left to hide the last one behind: one kernel ends sooner than messages.
            last = partial
            continue
        ready = main.record_event()
        side.send.wait_event(ready)
        side.finish.wait_event(ready)
        if ranks == 2:
            _cross(partial, y, start, channel, side, box)
        else:
            gather.append(_scatter(partial, y, start, channel, chunks, side, box))
    with torch.cuda.stream(side.finish):
        for later in gather:
            later()
        box.close()

    def finish():
        if last is not None:
            symmetric.push(group).sum(last, y[len(y) - len(last) :])
        side.join(main)

    return Pending(y, finish, partials)


def _fill(fill: Fill | None, bounds: list[int], side: Streams) -> dict[int, torch.cuda.Event]:
    """Fills the first rows at once, the others beside the products; the events of those."""
    if fill is None:
        return {}
    fill(bounds[0], bounds[1])
    filled = {}
    with torch.cuda.stream(side.publish):
        for start, stop in pairwise(bounds[1:]):
            fill(start, stop)
            filled[start] = side.publish.record_event()
    return filled


def _cross(partial, y, start: int, channel: int, side: Streams, box) -> None:
    """Two ranks: send the own partial, add the other one's."""
    (peer,) = box.shared.peers
    at = start * y.shape[1]
    with torch.cuda.stream(side.send):
        box.send(peer, channel, partial, at)
    with torch.cuda.stream(side.finish):
        other = box.receive(peer, channel, partial.shape, partial.dtype, at)
        torch.add(partial, other, out=y[start : start + len(partial)])


def _scatter(partial, y, start: int, channel: int, chunks: int, side: Streams, box):
    """More ranks: sum the own block of the chunk's rows and send it; the rest is gathered later."""
    rank, ranks, N = box.shared.rank, box.shared.ranks, y.shape[1]
    cut = [len(partial) * r // ranks for r in range(ranks + 1)]
    blocks = [slice(cut[r], cut[r + 1]) for r in range(ranks)]
    # The first part of a mailbox has the partials, for each chunk one block from every rank, which
    # are at most `ranks` rows more than the chunk's; the second has the sums, where y has them.
    half = (len(y) + chunks * ranks) * N

    def place(source: int, owner: int) -> int:
        own = cut[owner + 1] - cut[owner]
        return (start + (channel - 1) * ranks + source * own) * N

    with torch.cuda.stream(side.send):
        for peer in box.shared.peers:
            box.send(peer, channel, partial[blocks[peer]], place(rank, peer))
    own = y[start + cut[rank] : start + cut[rank + 1]]
    with torch.cuda.stream(side.finish):
        parts = {
            peer: box.receive(peer, channel, own.shape, own.dtype, place(peer, rank))
            for peer in box.shared.peers
        }
        parts[rank] = partial[blocks[rank]]
        add.add_in_order([parts[r] for r in range(ranks)], own)
        summed = side.finish.record_event()
    side.publish.wait_event(summed)
    with torch.cuda.stream(side.publish):
        for peer in box.shared.peers:
            box.send(peer, chunks + channel, own, half + (start + cut[rank]) * N)

    def gather():
        for peer in box.shared.peers:
            rows = y[start + cut[peer] : start + cut[peer + 1]]
            at = half + (start + cut[peer]) * N
            rows.copy_(box.receive(peer, chunks + channel, rows.shape, rows.dtype, at))

    return gather
