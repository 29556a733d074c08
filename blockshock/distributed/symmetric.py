"""Buffers that every rank of a group on one host can write: PyTorch's symmetric memory.

    Push       one kernel: a rank writes its partial into the others' buffers and adds what it got
    Mailbox    messages by the copy engine, which takes no processor from the products: a rank
               copies into the receiver's buffer and signals, the receiver's stream waits
    Partials   what `wide24` of two ranks adds tile by tile, while it multiplies
    TwoShot    PyTorch's own two-shot all-reduce, on a staged copy

All of it can be captured in CUDA graphs. NVLink multicast is not used. Each use of a group's
buffers stands in `uses(group)`, which orders the uses of a rank; all ranks must make them in the
same order. The buffers go with the group: once it is destroyed and nobody refers to it, or at the
latest when the next ones are made. A graph that captured them must not be replayed after that.
"""

import os
import socket
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from blockshock.distributed import groups
from blockshock.distributed.uses import Uses
from blockshock.kernels import nvrtc

PUSH_BLOCKS, PUSH_SPAN = 512, 2048  # blocks of threads, and vectors of 16 bytes for each
PUSH_BYTES = PUSH_BLOCKS * PUSH_SPAN * 16  # 16 MiB
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@dataclass
class _Held:
    """Of a group on this rank: its buffers by class, the roomiest last, and their uses."""

    uses: Uses = field(default_factory=Uses)
    made: dict[type, list] = field(default_factory=dict)
    why_not: list[str | None] = field(default_factory=list)  # the answer, once it is known

    def __del__(self):
        """Inside a capture no memory can be freed: it stays until the next buffers are made."""
        on_gpu = self.made and torch.cuda.is_available()
        if on_gpu and torch.cuda.is_current_stream_capturing():
            _to_free.append(self.made)


_to_free: list[dict] = []
_held = groups.ByGroup(_Held)


def uses(group=None) -> Uses:
    """The uses of the group's buffers: `with uses(group):`, or its `begin` and `end`."""
    return _held.of(group).uses


def held_bytes() -> int:
    """Bytes of all buffers on this rank, which PyTorch's allocator does not count."""
    made = (one for held in _held.all() for of_class in held.made.values() for one in of_class)
    return sum(one.shared.memory.nbytes for one in made)


def why_not(group=None) -> str | None:
    """Why the ranks of a group cannot reach each other's memory, or None. A collective, once."""
    known = _held.of(group).why_not
    if not known:
        known.append(_why_not(groups.itself(group)))
    return known[0]


def _why_not(group) -> str | None:
    if "nccl" not in dist.get_backend(group):
        return "its ranks have no GPU each"
    device = torch.cuda.current_device()
    here = socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES"), device
    there = [None] * dist.get_world_size(group)
    dist.all_gather_object(there, here, group=group)
    problem = _problem(device, there)
    found = [None] * len(there)
    dist.all_gather_object(found, problem, group=group)
    return next((problem for problem in found if problem), None)


def _problem(device: int, there: list[tuple]) -> str | None:
    if len({host for host, _, _ in there}) > 1:
        return "its ranks are on several hosts"
    if len({visible for _, visible, _ in there}) > 1:
        return "its ranks do not see each other's GPUs (CUDA_VISIBLE_DEVICES differs)"
    for _, _, other in there:
        if other != device and not torch.cuda.can_device_access_peer(device, other):
            return f"GPU {device} cannot reach the memory of GPU {other}"
    try:
        from torch.distributed import _symmetric_memory as symmetric

        symmetric.empty(16, dtype=torch.uint8, device=torch.device("cuda", device))
    except (ImportError, RuntimeError) as error:
        return f"symmetric memory does not work here: {str(error).splitlines()[0]}"
    return None


class Shared:
    """A buffer on every rank of a group, each of which can write all of them.

    Making one is a collective that waits: not inside a capture.
    """

    def __init__(self, nbytes: int, group=None):
        from torch.distributed import _symmetric_memory as symmetric

        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a graph is being captured and the ranks have no shared buffer of "
                f"{nbytes} bytes yet; run this shape once before the capture"
            )
        _held.drop_destroyed()
        _to_free.clear()
        # PyTorch would set multicast up beside the buffer; nothing here uses it.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        device, group = torch.device("cuda", torch.cuda.current_device()), groups.itself(group)
        self.name = group.group_name  # the group itself would be kept alive by its own buffers
        self.memory = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        self.handle = symmetric.rendezvous(self.memory, group)
        self.memory.zero_()
        torch.cuda.synchronize()
        dist.barrier(group, device_ids=[device.index])
        self.rank, self.ranks = self.handle.rank, self.handle.world_size
        self.peers = [(self.rank + away) % self.ranks for away in range(1, self.ranks)]

    def at(self, rank: int, shape, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """A tensor in the buffer of a rank; offset in elements."""
        return self.handle.get_buffer(rank, tuple(shape), dtype, offset)


class Push:
    """`push_sum.cu` and its buffers."""

    def __init__(self, group=None):
        ranks = dist.get_world_size(group)
        flags = ranks * PUSH_BLOCKS
        data = 2 * ranks * PUSH_BYTES
        self.shared = Shared(data + 4 * flags, group)
        addresses = self.shared.handle.buffer_ptrs
        device = self.shared.memory.device
        self.buffers = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.flags = self.buffers + data
        self.epochs = torch.zeros(PUSH_BLOCKS, dtype=torch.int32, device=device)

    def sum(self, partial: Tensor, out: Tensor) -> None:
        """out = the ranks' partials added; contiguous, at most PUSH_BYTES, a multiple of 16."""
        count = partial.nbytes // 16
        span = max(512, -(-count // PUSH_BLOCKS))  # a vector a thread at least
        kernel = nvrtc.kernel(
            "push_sum.cu",
            "push_sum",
            KIND=DTYPES[partial.dtype],
            RANKS=self.shared.ranks,
            RANK=self.shared.rank,
            BLOCKS=PUSH_BLOCKS,
            SPAN=PUSH_SPAN,
        )
        arguments = [partial, out, self.buffers, self.flags, self.epochs, count, span]
        kernel((-(-count // span), 1, 1), (512, 1, 1), arguments)


class Mailbox:
    """Messages between the ranks, each with a channel of its own, in rounds.

    A round begins with `open` and ends with `close`; in between every rank sends what the others
    receive. `open` waits until a peer has read the messages of the round before.
    """

    CLOSED = 0  # the signal of `close`; the message of channel c has the signal c + 1

    def __init__(self, nbytes: int, group=None):
        self.shared = Shared(nbytes, group)
        self.nbytes = nbytes
        for peer in self.shared.peers:
            self.shared.handle.put_signal(peer, self.CLOSED)

    def open(self, peer: int) -> None:
        """Before the first `send` of a round to a peer, in its stream."""
        self.shared.handle.wait_signal(peer, self.CLOSED)

    def close(self) -> None:
        """After everything received in the round was read, in the stream of the last reader."""
        for peer in self.shared.peers:
            self.shared.handle.put_signal(peer, self.CLOSED)

    def send(self, peer: int, channel: int, message: Tensor, offset: int) -> None:
        """Copies a contiguous tensor into the peer's buffer, offset in elements, and signals."""
        self.shared.at(peer, message.shape, message.dtype, offset).copy_(message)
        self.shared.handle.put_signal(peer, channel + 1)

    def receive(self, peer: int, channel: int, shape, dtype: torch.dtype, offset: int) -> Tensor:
        """The message of a peer, in this rank's buffer, valid until `close`."""
        self.shared.handle.wait_signal(peer, channel + 1)
        return self.shared.at(self.shared.rank, shape, dtype, offset)


class Partials:
    """Two buffers in turn of partials of both ranks, each read by the other, with flags: `wide24`.

    A partial has at least 128 rows and 64 columns: then a buffer has fewer tiles than flags.
    """

    def __init__(self, nbytes: int, group=None):
        flags = nbytes // 2048
        self.shared, self.nbytes = Shared(2 * nbytes + 4 * flags, group), nbytes
        (peer,) = self.shared.peers
        self.flags, self.their_flags = (
            self.shared.at(rank, (flags,), torch.int32, 2 * nbytes // 4)
            for rank in (self.shared.rank, peer)
        )
        self.state = torch.zeros(2, dtype=torch.int32, device=self.flags.device)

    def of(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both buffers as [2, rows, columns], of this rank and of the other one."""
        if rows < 128 or columns < 64:
            raise ValueError(f"partials of {rows} x {columns}: at least 128 x 64 are needed")
        room, (peer,) = self.nbytes // dtype.itemsize, self.shared.peers
        both = (self.shared.at(rank, (2, room), dtype) for rank in (self.shared.rank, peer))
        return tuple(one[:, : rows * columns].view(2, rows, columns) for one in both)


class TwoShot:
    """`symm_mem.two_shot_all_reduce_out` on a staged copy; bf16 or float32."""

    def __init__(self, nbytes: int, group=None):
        self.shared, self.nbytes = Shared(nbytes, group), nbytes

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of the ranks' partials, contiguous, of at most nbytes."""
        lanes = 16 // partial.element_size() * self.shared.ranks  # each rank sums whole vectors
        room = -(-partial.numel() // lanes) * lanes
        staged = self.shared.memory.view(partial.dtype)[:room]
        staged[: partial.numel()] = partial.view(-1)
        out = partial.new_empty(room)
        torch.ops.symm_mem.two_shot_all_reduce_out(staged, "sum", self.shared.name, out)
        return out[: partial.numel()].view(partial.shape)


def push(group=None) -> Push:
    """The group's `Push`, made on first use."""
    made = _made(Push, group)
    if not made:
        made.append(Push(group))
    return made[0]


def two_shot(nbytes: int, group=None) -> TwoShot:
    """The group's `TwoShot`, with room for at least nbytes."""
    return _roomy(TwoShot, nbytes, group)


def partials(nbytes: int, group=None) -> Partials:
    """The group's `Partials`, with room for nbytes each; of two ranks."""
    return _roomy(Partials, nbytes, group)


def mailbox(nbytes: int, group=None) -> Mailbox:
    """The group's `Mailbox`, with room for at least nbytes."""
    return _roomy(Mailbox, nbytes, group)


def _roomy(cls, nbytes: int, group):
    """The largest made so far, or a new one. Outgrown ones stay: captured graphs may use them."""
    made = _made(cls, group)
    if not made or made[-1].nbytes < nbytes:
        made.append(cls(1 << max(24, (nbytes - 1).bit_length()), group))
    return made[-1]


def _made(cls, group) -> list:
    return _held.of(group).made.setdefault(cls, [])
