"""Ways to sum the ranks' partial products, and which one is taken.

    Y = Σ_r P_r,   P_r = product_r(X) [B, N];   every rank gets the same bits

    collective   the backend's all_reduce, after the product ("auto" may hide it, chunk by chunk)
    two_shot     PyTorch's symmetric-memory kernel (reduce-scatter, all-gather), after the product
    exchange     through the other ranks' memory, in one kernel for small messages, else hidden: the
                 rows of X are cut in chunks, and each chunk's partial travels by the copy engine
                 while the next one is multiplied; or the product adds, tile by tile (`wide24`)

With two ranks the partials of a chunk cross and both add them. With R > 2 each rank sums an R-th of
a chunk's rows, in the order of the ranks in float32, and sends the sum to all others. `plans` says
what there is to choose from under "auto", and of the chunks of an exchange; who chooses measures
(`tuning`). Where the ranks cannot write each other's memory the sum is `collective`, and the plan
says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from blockshock.distributed import collectives, exchange, symmetric
from blockshock.distributed.exchange import Pending
from blockshock.measure.regions import region

SUMS = ("auto", "collective", "two_shot", "exchange")
CHUNKS = (4, 2, 8, 3, 6)  # into which rows may be cut, the likeliest first
FEWEST_ROWS = 128  # of a chunk; less does not fill the tiles of a product


@dataclass(frozen=True)
class Plan:
    """One way, settled. reason: why not as asked.

    chunks: of an exchange, 0 in one kernel; of a collective that is hidden, 0 if it is not.
    by_tiles: an exchange that the product makes.
    """

    how: str
    chunks: int = 0
    reason: str = ""
    by_tiles: bool = False

    def __str__(self) -> str:
        text = self.how
        if self.by_tiles:
            text += ", tile by tile"
        elif self.how == "exchange" and self.chunks < 2:
            text += ", in one piece" if self.chunks else ", in one kernel"
        elif self.chunks:
            text += f", {self.chunks} chunks"
        return text + (f" ({self.reason})" if self.reason else "")


def unsupported(how: str, dtype: torch.dtype, device_type: str) -> str | None:
    """Why a way cannot be asked for, or None."""
    if how not in SUMS:
        return f"unknown sum {how!r}; use one of {', '.join(SUMS)}"
    if how in ("two_shot", "exchange") and device_type != "cuda":
        return f"the sum {how!r} needs GPUs that reach each other's memory; use 'collective'"
    if how == "two_shot" and dtype not in (torch.bfloat16, torch.float32):
        return "the sum 'two_shot' takes bf16 or fp32; use 'exchange' or 'collective'"
    if how == "exchange" and dtype not in symmetric.DTYPES:
        return "the sum 'exchange' takes bf16, fp16 or fp32; use 'collective'"
    return None


def plans(
    how: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device,
    group=None,
    *,
    hide: bool = False,
    by_tiles: bool = False,
) -> list[Plan]:
    """What can be done for partials [rows, columns] where `how` is asked for; the first by rule.

    hide: behind other work of the caller, so in one piece. by_tiles: whether the product can add.
    A collective of the group on first use, and alike on all its ranks.
    """
    ranks = collectives.group_size(group)
    if ranks == 1 or how == "collective" or rows == 0:
        return [Plan("collective")]
    if device.type != "cuda":
        return [Plan("collective", reason="the ranks have no GPUs")]
    if problem := unsupported(how, dtype, "cuda"):  # the layer was cast since it was built
        return [Plan("collective", reason=problem)]
    if problem := symmetric.why_not(group):
        return [Plan("collective", reason=f"no {how}: {problem}")]
    if how == "two_shot":
        return [Plan("two_shot")]
    cuts = [chunks for chunks in CHUNKS if not hide and chunks * FEWEST_ROWS <= rows]
    exchanges = [Plan("exchange", chunks) for chunks in (1, *cuts)]
    row = columns * dtype.itemsize
    if rows * row <= symmetric.PUSH_BYTES and row % 16 == 0:  # what the one kernel moves
        exchanges.insert(0, Plan("exchange"))
    if by_tiles and ranks == 2 and not hide and rows >= FEWEST_ROWS:
        exchanges.append(Plan("exchange", by_tiles=True))
    if how == "exchange":
        return exchanges
    found = [Plan("collective")]
    if unsupported("exchange", dtype, "cuda") is None:
        found += exchanges
    if unsupported("two_shot", dtype, "cuda") is None:
        found.append(Plan("two_shot"))
    return found + [Plan("collective", chunks) for chunks in cuts if chunks in (2, 4)]


def begin_sum(
    product: Callable[[Tensor], Tensor],
    x: Tensor,
    chosen: Plan,
    group=None,
    *,
    hide: bool = False,
) -> Pending:
    """Starts Σ_r product(x) over the ranks; product takes some rows of x, and where it adds by
    tiles, `partials`: what gives it buffers of so many bytes (`symmetric.partials`).

    x is on the current device, and the result is waited for there: streams and buffers are its own.

    hide: whether the caller has other work to do before it waits.
    """
    if chosen.by_tiles:
        with symmetric.uses(group):
            return Pending(product(x, partials=partial(symmetric.partials, group=group)))
    if chosen.how == "exchange" and chosen.chunks:
        return exchange.begin(product, x, chosen.chunks, group, hide=hide)
    if chosen.how == "collective" and chosen.chunks:
        return exchange.begin_collective(product, x, chosen.chunks, group)
    own = product(x)
    if collectives.group_size(group) == 1:
        return Pending(own)
    own = collectives.fix_layout(own)
    if own.numel() == 0:
        return Pending(own)
    if chosen.how == "exchange":
        total = torch.empty_like(own)
        with region("allreduce", bytes=own.nbytes), symmetric.uses(group):
            symmetric.push(group).sum(own, total)
        return Pending(total)
    if chosen.how == "two_shot":
        with region("allreduce", bytes=own.nbytes), symmetric.uses(group):
            room = own.nbytes + 16 * collectives.group_size(group)  # even for every rank
            return Pending(symmetric.two_shot(room, group).sum(own))
    if hide:
        work = dist.all_reduce(own, group=group, async_op=True)
        return Pending(own, work.wait)
    return Pending(collectives.all_reduce(own, group))
