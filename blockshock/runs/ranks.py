"""The processes of a run: one, or those that torchrun started. Rank 0 prepares, shows and writes.

torchrun --nproc-per-node 2 -m blockshock.lm --config gpt2_124m
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from blockshock.distributed import attached, here
from blockshock.distributed.agree import told_by_all
from blockshock.runs.settings import Refused

DEADLINE = timedelta(minutes=30)  # of a collective whose peers are silent
PREPARE_SECONDS = 6 * 3600.0  # that the others wait for rank 0's tokens


@dataclass(frozen=True)
class Ranks:
    """This process among the others. side: a gloo group for small things, None if alone.

    Ranks that hold one model together, `tensor`, are side by side; they read the same data. Ranks
    that hold the same part of it, `data`, read each their own. A group is None where it has all
    ranks, or this one alone.
    """

    rank: int
    size: int
    device: torch.device
    side: Any
    tensor: Any = None
    data: Any = None
    tensor_size: int = 1

    @property
    def data_size(self) -> int:
        """How many models there are, each with its own part of the batch."""
        return self.size // self.tensor_size

    @property
    def data_rank(self) -> int:
        """Which of them this rank helps to hold."""
        return self.rank // self.tensor_size

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def split(self, tensor: int) -> "Ranks":
        """These ranks with groups of so many that hold one model. A collective.

        Raises:
            Refused: `tensor` does not divide the ranks.
        """
        if self.size % tensor:
            raise Refused(
                f"model.tensor_parallel = {tensor} does not divide {self.size} "
                f"rank{'s' * (self.size > 1)}; start a multiple of it (torchrun --nproc-per-node)"
            )
        if tensor == 1:
            return self
        if tensor == self.size:
            return replace(self, tensor_size=tensor)
        every = range(self.size)
        # NCCL's own deadline is shorter than the one of all ranks, and is not passed on.
        made = partial(dist.new_group, timeout=DEADLINE)
        tensors = [made(every[at : at + tensor]) for at in every[::tensor]]
        datas = [made(every[at::tensor]) for at in range(tensor)]
        found = tensors[self.rank // tensor], datas[self.rank % tensor]
        return replace(self, tensor=found[0], data=found[1], tensor_size=tensor)

    def leave(self) -> None:
        """Ends the process group, whose threads would abort a process that exits beside them."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def wait(self, what: str, seconds: float = PREPARE_SECONDS) -> None:
        """Until all ranks are here. Raises RuntimeError, which names `what`, after the deadline."""
        if self.size > 1:
            told_by_all("", about=what, seconds=seconds)

    def gather(self, value: Any) -> list[Any]:
        """One plain value of each rank, in their order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.side)
        return values

    def by_first(self, act: Callable[[], Any]) -> None:
        """Rank 0 acts. What is Refused there is Refused on every rank: none waits for it."""
        problem = None
        if self.first:
            try:
                act()
            except Refused as error:
                problem = str(error)
        problem = self.gather(problem)[0]
        if problem:
            raise Refused(problem)

    def mean(self, values: torch.Tensor) -> list[float]:
        """The mean over the ranks of some numbers [n] on the device; waits for it."""
        if self.size > 1:
            dist.all_reduce(values)
        return (values / self.size).tolist()


def join(device: str) -> Ranks:
    """Joins the others, if torchrun started this process. device: "auto", "cpu" or "cuda".

    Raises:
        Refused: no GPU for this rank.
    """
    local = int(os.environ.get("LOCAL_RANK", 0)) if attached.launched() else 0
    found = torch.cuda.device_count()
    if device == "cuda" or (device == "auto" and found):
        if local >= found:
            raise Refused(
                f"device = {device}: local rank {local} needs GPU {local}, found {found}; lower "
                "--nproc-per-node, or use device=cpu"
            )
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
    else:
        where = torch.device("cpu")
    if not attached.launched():
        return Ranks(0, 1, where, None)
    here.without_multicast(os.environ)
    on_gpu = where.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=DEADLINE, device_id=where if on_gpu else None
    )
    side = dist.new_group(backend="gloo", timeout=DEADLINE)
    return Ranks(dist.get_rank(), dist.get_world_size(), where, side)


class Stop:
    """Ctrl-C or SIGTERM, to any rank, as a wish that all ranks learn of at the same step.

    with Stop(ranks) as stop:
        stop.ask()              as a step begins: each rank's flag is on its way to the others
        ...                     the step; no device waits for the flags
        if stop.decided(): ...  as it ends, alike on every rank

    Inside the block the signals do nothing else. SIGQUIT (Ctrl-\\) or SIGKILL ends at once.
    """

    def __init__(self, ranks: Ranks):
        self._ranks, self._wanted = ranks, False
        self._flag, self._work, self._before = torch.zeros(1, dtype=torch.int32), None, {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._want)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _want(self, *_: object) -> None:
        self._wanted = True

    def ask(self) -> None:
        """Begins the vote on the step that begins."""
        self._flag.fill_(self._wanted)
        if self._ranks.size > 1:
            self._work = dist.all_reduce(
                self._flag, dist.ReduceOp.MAX, group=self._ranks.side, async_op=True
            )

    def decided(self) -> bool:
        """Whether any rank wanted to stop when it asked."""
        if self._work is not None:
            self._work.wait()
        return bool(self._flag)
