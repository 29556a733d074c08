"""The sum over ranks hidden behind the product that makes the partials.

    for each chunk c of the rows of X:     P_c = product(X_c)
        two ranks    P_c is copied to the other rank; both add what came:  Y_c = P_c + P'_c
        more ranks   block r of P_c is copied to rank r, which adds the blocks in the order of the
                     ranks and copies the sum to all others

All copies are the copy engines', in streams of their own, while chunk c + 1 is multiplied. What is
left at the end is the last chunk's way; with two ranks it takes one kernel, if it is small.
(`begin_collective` leaves the sums of the chunks to the backend.)
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from blockshock.distributed import collectives, symmetric
from blockshock.kernels import add
from blockshock.measure.regions import region


class Pending:
    """A result on its way: `wait` must be called in the stream that began it, before the next one
    of the group is begun.

    name: the region of the time that was not hidden. then: what is left to do after it.
    """

    def __init__(
        self,
        result: Tensor,
        finish: Callable[[], None] | None = None,
        held=(),
        *,
        name: str = "allreduce",
        then: Callable[[], None] | None = None,
    ):
        self._result, self._finish, self._held = result, finish, held
        self._name, self._then = name, then

    def wait(self) -> Tensor:
        """The result."""
        if self._finish is not None:
            with region(self._name, bytes=self._result.nbytes):
                self._finish()
        if self._then is not None:
            self._then()
        self._held = ()
        return self._result


@dataclass
class Streams:
    """Beside the caller's, with priority, so that small kernels need not wait for a product's end.

    send, publish: one to each other rank, so that several copy engines work at once; publish has
    the sums of more than two ranks. finish: adds.
    """

    send: list[torch.cuda.Stream]
    publish: list[torch.cuda.Stream]
    finish: torch.cuda.Stream

    @property
    def all(self) -> list[torch.cuda.Stream]:
        """All of them."""
        return [*self.send, *self.publish, self.finish]

    def fork(self) -> torch.cuda.Stream:
        """Makes them wait for the caller's stream, which is returned."""
        main = torch.cuda.current_stream()
        for stream in self.all:
            stream.wait_stream(main)
        return main

    def join(self, main: torch.cuda.Stream) -> None:
        """Makes the caller's stream wait for them."""
        for stream in self.all:
            main.wait_stream(stream)


_streams: dict[tuple[int, int], Streams] = {}


def streams(ranks: int) -> Streams:
    """The current device's, for a group of so many ranks."""
    key = torch.cuda.current_device(), ranks
    if key not in _streams:
        made = [torch.cuda.Stream(priority=-1) for _ in range(2 * ranks - 1)]
        publish = made[ranks - 1 : -1] if ranks > 2 else []
        _streams[key] = Streams(made[: ranks - 1], publish, made[-1])
    return _streams[key]


TILE = 128  # rows: chunks end where a product's tiles do, and need no padding (`sparse24`)


def cut(rows: int, chunks: int) -> list[int]:
    """Where chunks begin and end: 0, …, rows; at multiples of TILE, if each has two or more."""
    tile = TILE if rows >= 2 * TILE * chunks else 1
    return [rows * c // chunks // tile * tile for c in range(chunks)] + [rows]


def begin(
    product: Callable[[Tensor], Tensor],
    x: Tensor,
    chunks: int,
    group=None,
    *,
    hide: bool = False,
) -> Pending:
    """Starts Σ_r product(x), the rows of x cut in chunks; see `reduce.begin_sum`."""
    bounds = cut(len(x), chunks)
    ranks = collectives.group_size(group)
    side, partials = streams(ranks), []
    with ExitStack() as use:
        use.enter_context(symmetric.uses(group))
        main, y, box, last = side.fork(), None, None, None
        try:
            for chunk, (start, stop) in enumerate(pairwise(bounds)):
                partial = collectives.fix_layout(product(x[start:stop]))
                partials.append(partial)  # held until the streams have joined
                if y is None:
                    y = partial.new_empty(len(x), partial.shape[1])
                    row = y.shape[1] * y.element_size()
                    # With two ranks the mailbox has partials, with more their sums as well.
                    room = y.nbytes if ranks == 2 else 2 * y.nbytes + chunks * ranks * row
                    box = symmetric.mailbox(room, group)
                    for peer, stream in zip(box.shared.peers, side.send, strict=True):
                        with torch.cuda.stream(stream):
                            box.open(peer)
                small = partial.nbytes <= symmetric.PUSH_BYTES and row % 16 == 0
                if ranks == 2 and stop == len(x) and not hide and small:
                    # Nothing is left to hide the last one behind: one kernel ends sooner than
                    # messages.
                    last = partial
                    continue
                ready = main.record_event()
                for stream in (*side.send, side.finish):
                    stream.wait_event(ready)
                if ranks == 2:
                    _cross(partial, y, start, chunk, side, box)
                else:
                    _scatter(partial, y, start, chunk, chunks, side, box)
        except BaseException:  # ranks that fail at the same chunk can go on with the next round
            _close(side, box)
            side.join(main)
            raise
        _close(side, box)
        ends = use.pop_all()

    def finish():
        with ends:
            if last is not None:
                symmetric.push(group).sum(last, y[len(y) - len(last) :])
            side.join(main)

    return Pending(y, finish, partials)


def _close(side: Streams, box: symmetric.Mailbox | None) -> None:
    for stream in side.publish:
        side.finish.wait_stream(stream)
    if box is not None:
        with torch.cuda.stream(side.finish):
            box.close()


def begin_collective(
    product: Callable[[Tensor], Tensor], x: Tensor, chunks: int, group=None
) -> Pending:
    """The same by the backend: a chunk's all_reduce runs beside the next chunk's product."""
    bounds = cut(len(x), chunks)
    side, partials, y = streams(collectives.group_size(group)), [], None
    main = side.fork()
    try:
        for start, stop in pairwise(bounds):
            partial = collectives.fix_layout(product(x[start:stop]))
            partials.append(partial)
            if y is None:
                y = partial.new_empty(len(x), partial.shape[1])
            work = dist.all_reduce(partial, group=group, async_op=True)
            with torch.cuda.stream(side.finish):
                work.wait()
                y[start:stop].copy_(partial)
    except BaseException:
        side.join(main)
        raise
    return Pending(y, lambda: side.join(main), partials)


def _cross(partial, y, start: int, chunk: int, side: Streams, box) -> None:
    """Two ranks: send the own partial, add the other one's."""
    (peer,), at = box.shared.peers, start * y.shape[1]
    with torch.cuda.stream(side.send[0]):
        box.send(peer, chunk, partial, at)
    with torch.cuda.stream(side.finish):
        other = box.receive(peer, chunk, partial.shape, partial.dtype, at)
        torch.add(partial, other, out=y[start : start + len(partial)])


def _scatter(partial, y, start: int, chunk: int, chunks: int, side: Streams, box) -> None:
    """More ranks: add the own block of the chunk's rows, send the sum, and receive the others'."""
    rank, ranks, N = box.shared.rank, box.shared.ranks, y.shape[1]
    cut = [len(partial) * r // ranks for r in range(ranks + 1)]
    # The first part of a mailbox has the partials, for each chunk one block from every rank, which
    # are at most `ranks` rows more than the chunk's; the second has the sums, where y has them.
    half = (len(y) + chunks * ranks) * N

    def place(source: int, owner: int) -> int:
        own = cut[owner + 1] - cut[owner]
        return (start + chunk * ranks + source * own) * N

    def rows(of: Tensor, owner: int, first: int = 0) -> Tensor:
        return of[first + cut[owner] : first + cut[owner + 1]]

    for peer, stream in zip(box.shared.peers, side.send, strict=True):
        with torch.cuda.stream(stream):
            box.send(peer, chunk, rows(partial, peer), place(rank, peer))
    own = rows(y, rank, start)
    with torch.cuda.stream(side.finish):
        parts = {
            peer: box.receive(peer, chunk, own.shape, own.dtype, place(peer, rank))
            for peer in box.shared.peers
        }
        parts[rank] = rows(partial, rank)
        add.add_in_order([parts[r] for r in range(ranks)], own)
        summed = side.finish.record_event()
    for peer, stream in zip(box.shared.peers, side.publish, strict=True):
        stream.wait_event(summed)
        with torch.cuda.stream(stream):
            box.send(peer, chunks + chunk, own, half + (start + cut[rank]) * N)
    # All sends stand before any receive: streams may share a queue of the hardware.
    for peer, stream in zip(box.shared.peers, side.publish, strict=True):
        with torch.cuda.stream(stream):
            theirs = rows(y, peer, start)
            at = half + (start + cut[peer]) * N
            theirs.copy_(box.receive(peer, chunks + chunk, theirs.shape, theirs.dtype, at))
