"""How the ranks' results become one: summed, or gathered and put in their places.

A join begins with a product that it runs, on some or all rows, and ends with a tensor that every
rank holds in the same bits. In between the caller may do other work (`hide`).
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from blockshock.distributed import collectives, exchange, reduce, symmetric
from blockshock.distributed.exchange import Pending
from blockshock.distributed.reduce import Plan
from blockshock.measure.regions import region

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sum:
    """Partials [B, columns] are added. how: a name in `reduce.SUMS`."""

    how: str
    columns: int
    group: object = None

    def plans(
        self,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        hide: bool = False,
        by_tiles: bool = False,
    ) -> list[Plan]:
        """What can be done for a batch of rows, the first by rule; hide: behind other work;
        by_tiles: the product can add."""
        asked = {"hide": hide, "by_tiles": by_tiles}
        return reduce.plans(self.how, batch, self.columns, dtype, device, self.group, **asked)

    def begin(self, product: Product, x: Tensor, plan: Plan, *, hide: bool = False) -> Pending:
        """Starts Σ_r product(x)."""
        return reduce.begin_sum(product, x, plan, self.group, hide=hide)


@dataclass(frozen=True)
class Gather:
    """Parts are sent to all ranks; `place(parts, out)` writes them into [B, columns].

    By the backend's all_gather, or through the mailboxes, always in one piece.
    """

    how: str
    columns: int
    place: Callable[[list[Tensor], Tensor], None]
    group: object = None

    def plans(
        self,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        hide: bool = False,
        by_tiles: bool = False,
    ) -> list[Plan]:
        """What can be done for a batch of rows, the first by rule."""
        sums = reduce.plans(self.how, batch, self.columns, dtype, device, self.group, hide=True)
        if self.how == "two_shot" and sums[0].how == "two_shot":
            return [Plan("collective", reason="a gather has no two shots")]
        return [p for p in sums if p.how == "collective" or p == Plan("exchange", 1)]

    def begin(self, product: Product, x: Tensor, plan: Plan, *, hide: bool = False) -> Pending:
        """Starts gathering product(x)."""
        part, ranks = product(x), collectives.group_size(self.group)
        out = part.new_empty(len(part), self.columns)
        if ranks == 1 or out.numel() == 0:
            self._write([part] * ranks, out)
            return Pending(out)
        part = collectives.fix_layout(part)
        if plan.how == "exchange":
            return self._exchange(part, out)
        if not hide:
            self._write(list(collectives.all_gather(part, self.group)), out)
            return Pending(out)
        gathered, work = collectives.start_all_gather(part, self.group)

        def write():
            self._write(list(gathered), out)

        return Pending(out, work.wait, [part], name="allgather", then=write)

    def _write(self, parts: list[Tensor], out: Tensor) -> None:
        with region("layout_fix", bytes=out.nbytes):
            self.place(parts, out)

    def _exchange(self, part: Tensor, out: Tensor) -> Pending:
        ranks = collectives.group_size(self.group)
        side = exchange.streams(ranks)
        with ExitStack() as use:
            use.enter_context(symmetric.uses(self.group))
            box = symmetric.mailbox(ranks * part.nbytes, self.group)
            rank, main = box.shared.rank, side.fork()
            for peer, stream in zip(box.shared.peers, side.send, strict=True):
                with torch.cuda.stream(stream):
                    box.open(peer)
                    box.send(peer, 0, part, rank * part.numel())
            with torch.cuda.stream(side.finish):
                parts = {
                    peer: box.receive(peer, 0, part.shape, part.dtype, peer * part.numel())
                    for peer in box.shared.peers
                }
                parts[rank] = part
                try:
                    self.place([parts[r] for r in range(ranks)], out)
                finally:
                    box.close()
            ends = use.pop_all()

        def finish():
            with ends:
                side.join(main)

        return Pending(out, finish, [part], name="allgather")


def side_by_side(parts: list[Tensor], out: Tensor) -> None:
    """Contiguous slices of columns, one a rank."""
    torch.cat(parts, dim=1, out=out)
