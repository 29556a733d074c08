"""Ways to sum the ranks' partial products, and which one is taken.

    Y = Σ_r P_r,   P_r = product_r(X) [B, N];   every rank gets the same bits

    collective   the backend's all_reduce, after the product ("auto" may hide it, chunk by chunk)
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

import torch
import torch.distributed as dist
from torch import Tensor

from blockshock import choices
from blockshock.distributed import collectives, exchange, symmetric
from blockshock.distributed.exchange import Pending
from blockshock.measure.regions import region

SUMS = ("auto", "collective", "two_shot", "exchange")
MAX_CHUNKS = 8


@dataclass(frozen=True)
class Plan:
    """One way, settled. reason: why not as asked.

    chunks: of an exchange, 0 in one kernel; of a collective that is hidden, 0 if it is not.
    """

    how: str
    chunks: int = 0
    reason: str = ""

    def __str__(self) -> str:
        text = self.how
        if self.how == "exchange" and self.chunks < 2:
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


def plan(how: str, rows: int, columns: int, depth: int, dtype, device, group=None) -> Plan:
    """The way for partials [rows, columns] whose products sum over `depth` columns of X.

    A collective on first use; alike on all ranks, as the table is read by the group's first one.
    """
    ranks = collectives.group_size(group)
    if group is None and ranks > 1:
        group = dist.group.WORLD  # another one after the process group was made anew
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
    found = choices.fastest_sum(ranks=ranks, N=columns, K=depth, B=rows, dtype=dtype)
    if how == "auto" and (found is None or found["how"] != "exchange"):
        reason = "" if found else f"no sum of {dtype} over {ranks} ranks was measured on this GPU"
        if not found and dtype.itemsize == 2:
            reason += f": python -m blockshock.tune --ranks {ranks}"
        name = found["how"] if found else "collective"
        if unsupported(name, dtype, "cuda"):
            return Plan("collective", reason=f"{name} was faster in another dtype")
        chunks = min(found["chunks"], rows // 128) if found else 0
        return Plan(name, chunks if chunks > 1 else 0, reason)
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
) -> Pending:
    """Starts Σ_r product(x) over the ranks; product takes some rows of x.

    hide: whether the caller has other work to do before it waits.
    """
    if chosen.how == "exchange" and chosen.chunks:
        return exchange.begin(product, x, chosen.chunks, group, hide=hide)
    if chosen.how == "collective" and chosen.chunks:
        return exchange.begin_collective(product, x, chosen.chunks, group)
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
            room = partial.nbytes + 16 * collectives.group_size(group)  # even for every rank
            return Pending(symmetric.two_shot(room, group).sum(partial))
    if hide:
        work = dist.all_reduce(partial, group=group, async_op=True)
        return Pending(partial, work.wait)
    return Pending(collectives.all_reduce(partial, group))
