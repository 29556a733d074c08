"""Parameters in one flat buffer, of which each rank holds a share.

    full   [R·n]  all parameters one after another, in the dtype of the computation; memory only
                  while it is gathered
    share  [n]    full[r·n : (r+1)·n] on rank r, in the parameters' dtype; each parameter's .data is
                  its piece of it, 1-D and perhaps empty

    gather   full  = all-gather of the cast share, in place: no copy in, no copy out
    reduce   dfull = the parameters' gradients, copied together
             share's gradient += 1/R reduce-scatter of dfull

The collectives run on a stream of their own. All memory is allocated on the stream of the
computation, and is held until an event says that the other stream is done with it.
"""

from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from blockshock.distributed import collectives
from blockshock.linear.part import PartGradient

_ALIGN = 64  # entries; a parameter starts at 128 bytes or a multiple, as products like it


class Wire:
    """The ranks of a group, and the stream on which they communicate (on the CPU there is none)."""

    def __init__(self, group, device: torch.device):
        self.group, self.device = group, device
        self.ranks, self.rank = collectives.group_size(group), collectives.group_rank(group)
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._held: list[Tensor] = []
        self._done = None

    @contextmanager
    def after_computation(self):
        """What is launched inside runs beside the computation, after what that was given so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def event(self):
        """When what was communicated so far is done, for `wait`."""
        return self._stream.record_event() if self._stream is not None else None

    def wait(self, event) -> None:
        """What the computation is given from here on comes after the event. The host goes on."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def hold(self, *buffers: Tensor) -> None:
        """Keeps the memory of buffers until `settle`."""
        self._held, self._done = list(buffers), self.event()

    def settle(self) -> None:
        """The computation waits for what communicates with the buffers held, and frees them."""
        self.wait(self._done)
        self._held, self._done = [], None


class Flat:
    """Parameters of one dtype, all trained or all frozen, sharded over the ranks of a wire.

    The parameters stay the same objects: their .data becomes the share. dtype: of the full buffer.
    """

    def __init__(self, named: dict[str, nn.Parameter], dtype: torch.dtype, wire: Wire):
        self.names, self.params, self.wire = list(named), list(named.values()), wire
        self.shapes = [p.shape for p in self.params]
        self.trained, self._event = self.params[0].requires_grad, None
        spans = [_round_up(p.numel(), _ALIGN) for p in self.params]
        starts = [0, *accumulate(spans)][:-1]
        self._spans = list(zip(starts, map(torch.Size.numel, self.shapes), strict=True))
        self.n = _round_up(-(-max(sum(spans), 1) // wire.ranks), _ALIGN)
        self.pieces = self.pieces_of(wire.rank)
        self.share = torch.zeros(self.n, dtype=self.params[0].dtype, device=wire.device)
        with torch.no_grad():
            for i, p in enumerate(self.params):
                self.share[self.pieces[i]] = self.cut(i, p)
                p.grad = None  # it has the whole parameter's shape
                p.data = self.share[self.pieces[i]]
                if self.trained:
                    p.register_hook(partial(_check_unread, self.names[i]))
            full = torch.empty(wire.ranks * self.n, dtype=dtype, device=wire.device)
            self._full, self._bytes = full, full.nbytes
            # Aliases with version counters of their own: gathering again is no change of what
            # autograd has saved.
            self.views = [view.data for view in self._views(full)]
        self._place = [p.data_ptr() for p in self.params]
        full.untyped_storage().resize_(0)

    def pieces_of(self, rank: int) -> list[slice]:
        """Of each parameter, what a rank's share has of it, as a slice of that share."""
        low = rank * self.n
        bounds = [(start - low, start + size - low) for start, size in self._spans]
        return [slice(*(min(max(b, 0), self.n) for b in both)) for both in bounds]

    def cut(self, i: int, whole: Tensor) -> Tensor:
        """Of a tensor with the i-th parameter's shape, the entries that this rank holds, 1-D."""
        start = self.wire.rank * self.n + self.pieces[i].start - self._spans[i][0]
        size = self.pieces[i].stop - self.pieces[i].start
        return whole.reshape(-1)[start if size else 0 :][:size]

    def whole(self, i: int, piece: Tensor) -> Tensor:
        """The i-th parameter's tensor [its shape] of which each rank has a piece. A collective."""
        sizes = [p.stop - p.start for p in (self.pieces_of(r)[i] for r in range(self.wire.ranks))]
        padded = piece.new_zeros(max(sizes))
        padded[: piece.numel()] = piece.detach()
        parts = collectives.all_gather(padded, self.wire.group)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.view(self.shapes[i])

    def check(self) -> None:
        """Raises RuntimeError where a parameter is no longer what was sharded."""
        for name, p, place in zip(self.names, self.params, self._place, strict=True):
            if p.data_ptr() != place:
                raise RuntimeError(
                    f"{name!r} was moved or cast after it was wrapped; do so before, or wrap again"
                )
            if p.requires_grad != self.trained:
                change = "unfrozen" if p.requires_grad else "frozen"
                raise RuntimeError(f"{name!r} was {change} after it was wrapped; wrap it again")

    @property
    def gathered(self) -> bool:
        """Whether the full buffer has memory; its values are there after `wait`."""
        return self._full.untyped_storage().size() > 0

    @torch.no_grad()
    def gather(self) -> None:
        """Begins to gather, unless that was done."""
        if self.gathered:
            return
        self._full.untyped_storage().resize_(self._bytes)
        with self.wire.after_computation():
            own = self._full[self.wire.rank * self.n :][: self.n]
            own.copy_(self.share)
            collectives.all_gather_into(self._full, own, self.wire.group)
        self._event = self.wire.event()

    def wait(self) -> None:
        """The computation from here on may read `views`."""
        self.wire.wait(self._event)
        self._event = None

    def free(self) -> None:
        """Gives the full buffer's memory back, after all that the computation was given."""
        self.wait()
        self._full.untyped_storage().resize_(0)

    @torch.no_grad()
    def reduce(self, gradients: list[Tensor | None]) -> None:
        """Begins to add the mean over ranks of the whole gradients to those of the shares.

        None: zero. Done after `wire.settle`; only one reduction is under way at a time.
        """
        wire, master = self.wire, self.share.dtype
        wire.settle()
        partial = torch.empty_like(self._full)
        views = self._views(partial)
        present = [(v, g) for v, g in zip(views, gradients, strict=True) if g is not None]
        if present:
            torch._foreach_copy_(*map(list, zip(*present, strict=True)))
        for view, gradient in zip(views, gradients, strict=True):
            if gradient is None:
                view.zero_()
        part = partial.new_empty(self.n)
        mean = part if part.dtype == master else part.new_empty(self.n, dtype=master)
        pieces = [mean[piece] for piece in self.pieces]
        with wire.after_computation():
            collectives.reduce_scatter_into(part, partial, wire.group)
            if mean is not part:
                mean.copy_(part)
            mean.div_(wire.ranks)
            added = [
                (p.grad, d) for p, d in zip(self.params, pieces, strict=True) if p.grad is not None
            ]
            if added:
                torch._foreach_add_(*map(list, zip(*added, strict=True)))
        wire.hold(partial, part, mean)
        for p, piece in zip(self.params, pieces, strict=True):
            if p.grad is None:
                p.grad = PartGradient.of(piece, wire.group)

    def _views(self, full: Tensor) -> list[Tensor]:
        return [
            full[start : start + size].view(shape)
            for (start, size), shape in zip(self._spans, self.shapes, strict=True)
        ]


def _check_unread(name: str, gradient: Tensor | None) -> None:
    """Raises RuntimeError where autograd itself has a gradient for a share; units give it None."""
    if gradient is not None:
        raise RuntimeError(
            f"a loss uses {name!r} outside of its module's forward, where it is this rank's share; "
            "use it in a forward, or the optimizer's weight_decay for a penalty on its square"
        )


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
