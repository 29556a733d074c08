"""The ranks that torchrun started, on one node or several, with the interface of a pool.

Every rank runs the whole program; a run calls the function here, as it is called everywhere, and
gathers all results, so every rank sees the same list. Nothing is shared but the network: the ranks
meet through the rendezvous of the launcher.

These ranks cannot be replaced. When one raises and all others still come to the gathering, every
rank raises RankFailure and the program goes on. When the others are inside a collective that it
will never join, or a rank does not answer in time, the job ends: each rank says why, in the
launcher's report as well, and exits with code 1.
"""

from __future__ import annotations

import atexit
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from blockshock.distributed import call, here, wire
from blockshock.distributed.failure import RankFailure, Report, compose
from blockshock.distributed.watch import Job, Watch

START_SECONDS = 300.0  # for all ranks to join
# torchrun sets all of these. A scheduler or a shell may set one or two, which makes no such job.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in VARIABLES)


class AttachedRanks:
    """The ranks of this torchrun job; the interface is that of `Ranks`.

    Args:
        size: how many ranks the caller expects, None for any. device: "cuda" (NCCL, one GPU per
            rank) or "cpu" (gloo). timeout: seconds that a run may take.
        tell: on rank 0, takes a line, now and then, that says what a long run waits for.

    Raises:
        ValueError: the job has another size, or this host has too few GPUs.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        device: str,
        timeout: float = 120.0,
        tell: Callable[[str], None] | None = None,
    ):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ["LOCAL_RANK"])
        call.check_timeout(timeout)
        if size is not None and size != self.size:
            raise ValueError(
                f"{size} ranks were asked for and torchrun started {self.size}; start it with "
                f"{size} in all (nodes times --nproc-per-node), or ask for {self.size}"
            )
        if device == "cuda" and torch.cuda.device_count() <= local:
            raise ValueError(
                f"local rank {local} needs GPU {local}; found {torch.cuda.device_count()} GPUs. "
                'Lower --nproc-per-node, or use device="cpu"'
            )
        self.device, self.timeout = device, timeout
        self._tell = tell if self.rank == 0 else None
        self._where = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
        self._turn = 0
        self._lost = ""  # why nothing can be run any more
        self._closed = False
        self._busy = threading.Lock()

    def run(
        self, fn: Callable[..., Any], *args: Any, timeout: float | None = None, **kwargs: Any
    ) -> list[Any]:
        """Calls `fn(*args, **kwargs)` in every rank; the results, in rank order, on every rank.

        Raises: as `Ranks.run`, the same on every rank. Ends the process where that is impossible.
        """
        limit = self.timeout if timeout is None else timeout
        job = call.pack(fn, args, kwargs, limit)
        if self._closed:
            raise RuntimeError("these ranks are closed; open them again")
        if self._lost:
            raise RuntimeError(f"these ranks can run nothing more: {self._lost}")
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("these ranks are running something already; one run at a time")
        try:
            if Job.side is None:
                with Watch(self.rank, self.size, START_SECONDS, "joining the process group"):
                    _join(self._where)
            here.enter(self.rank, self._where)
            reports, answers = self._run(fn, job, limit)
        finally:
            self._busy.release()
        failed = [report for report in reports if report.kind != "answered"]
        if failed:
            first = min(failed, key=lambda report: report.error["when"])
            raise compose(reports, first, limit=limit, call=call.name(fn))
        return [call.unpack_result(answer) for answer in answers]

    def _run(
        self, fn: Callable[..., Any], job: bytes, limit: float
    ) -> tuple[list[Report], list[bytes]]:
        """Calls `fn` here and gathers what became of it everywhere."""
        self._turn += 1
        mine = Report(self.rank, kind="answered")
        with Watch(self.rank, self.size, limit, call.name(fn), self._tell) as watch:
            answer = b""
            try:
                answer = wire.dumps(_call(job), "the result")
            except KeyboardInterrupt:
                self._lost = "they were interrupted"
                raise
            except BaseException as error:
                mine.told(here.describe(error))
            mine.note, _ = here.last_note()
            watch.arrived(mine)
            heard: list[Any] = [None] * self.size
            try:
                turn = (self._turn, call.name(fn))
                dist.all_gather_object(heard, (turn, mine, answer), group=Job.side)
            except RuntimeError as error:  # gloo's: a peer has ended
                self._lost = f"rank {self.rank} of {self.size} lost its peers in {turn[1]}"
                text = mine.error.get("traceback", "") + str(error)
                raise RankFailure(
                    self._lost, kind="exited", rank=self.rank, note=mine.note, detail=text
                ) from error
        turns = [turn for turn, _, _ in heard]
        if len(set(turns)) > 1:
            self._lost = f"the ranks have parted: they run {turns}. All must run the same program"
            raise RuntimeError(self._lost)
        return [report for _, report, _ in heard], [answer for _, _, answer in heard]

    def close(self) -> None:
        """Runs nothing more. The process group stays: it cannot be joined a second time."""
        self._closed = True

    def __enter__(self) -> AttachedRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _join(where: torch.device) -> None:
    """Joins the default group (unless the program has done so) and makes the side group."""
    here.without_multicast(os.environ)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            timeout=here.GROUP_TIMEOUT,
            device_id=where if where.type == "cuda" else None,
        )
        atexit.register(_leave)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    Job.store = dist.PrefixStore(f"blockshock/{attempt}", dist.TCPStore(host, port))
    Job.side = dist.new_group(backend="gloo", timeout=here.GROUP_TIMEOUT)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _call(job: bytes) -> Any:
    """The call, with its own copy of the arguments, as it has in a pool."""
    fn, args, kwargs = pickle.loads(pickle.loads(job)[0])
    here.note("")
    return fn(*args, **kwargs)
