"""Gradients in buckets: flat buffers of one dtype, each of which is sent whole.

    buffer [n] = the gradients of some parameters, one after another;  p.grad = a view of it

The buckets follow the reverse order of registration, nearly that in which a backward makes
gradients. Where autograd made a new tensor (p.grad was None), a bucket's are copied at once when
all are there: one read and one write, where adding into zeros costs two reads and two writes.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate, groupby
from math import inf
from weakref import ref

import torch
from torch import Tensor, nn

MIB = 1 << 20
ALIGN = 16  # bytes: where a parameter begins in a buffer, so that kernels read whole vectors
UNUSED = ("error", "zero")
NO_BACKWARD = (
    "finish_gradient_sync() without a backward since the last one; call it once after the last "
    "backward of a step"
)


def unsupported(bucket_mib: float = 25.0, unused: str = "error") -> str | None:
    """Why these options cannot be had, or None."""
    if not bucket_mib > 0:
        return f"bucket_mib = {bucket_mib}: a bucket has more than 0 MiB, such as 25"
    if unused not in UNUSED:
        return f"unused = {unused!r}: use one of {', '.join(UNUSED)}"
    return None


def no_gradient(names: list[str]) -> str:
    """What the error says where unused parameters are one."""
    shown = ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "")
    return (
        f"no gradient for {len(names)} parameters: {shown}; freeze them before they are wrapped, "
        'or give unused="zero", which averages zeros'
    )


class Loose:
    """The gradients of some parameters, each where autograd put it.

    named: of one dtype and device.
    """

    def __init__(self, named: dict[str, nn.Parameter]):
        self.names, self.parameters = list(named), list(named.values())
        self.device = self.parameters[0].device
        self.renew()

    def renew(self) -> None:
        """Begins a step: no gradient is there."""
        every = range(len(self.parameters))
        self.unused, self.missing = set(every), set(every)  # of the step; of its last backward
        self.streams, self.finish = set(), None

    def adopt(self, places: Iterable[int] | None = None) -> None:
        """Makes the gradients of these parameters, or of all, ready to be sent; None becomes zeros.

        Raises RuntimeError for a gradient that is sparse or has a graph.
        """
        for i in self._checked(places):
            if self.parameters[i].grad is None:
                self.parameters[i].grad = torch.zeros_like(self.parameters[i])

    def check(self) -> None:
        """Raises RuntimeError where a parameter is not what it was when it was wrapped."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if not parameter.requires_grad:
                raise RuntimeError(f"{name!r} was frozen after it was wrapped; wrap it again")

    def _checked(self, places: Iterable[int] | None) -> Iterable[int]:
        places = range(len(self.parameters)) if places is None else places
        for i in places:
            gradient = self.parameters[i].grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided or gradient.requires_grad:
                raise RuntimeError(_not_plain(self.names[i], gradient))
        return places


class Bucket(Loose):
    """The gradients of some parameters in one buffer; their views are laid out like the parameters.

    ranks: the buffer can be cut evenly in so many shares.
    """

    def __init__(self, named: dict[str, nn.Parameter], ranks: int = 1):
        super().__init__(named)
        dtype = self.parameters[0].dtype
        unit = max(1, ALIGN // dtype.itemsize)
        sizes = [-(-p.numel() // unit) * unit for p in self.parameters]
        *self.offsets, stop = accumulate(sizes, initial=0)
        length = max(1, -(-stop // (unit * ranks))) * unit * ranks
        self.buffer = torch.zeros(length, dtype=dtype, device=self.device)
        self.views = self.views_of(self.buffer)
        self._addresses = [view.data_ptr() for view in self.views]

    def views_of(self, flat: Tensor) -> list[Tensor]:
        """The parameters' places in another buffer [n], with their shapes and strides."""
        strides = [torch.empty_like(p, device="meta").stride() for p in self.parameters]
        return [
            flat.as_strided(p.shape, stride, flat.storage_offset() + offset)
            for p, stride, offset in zip(self.parameters, strides, self.offsets, strict=True)
        ]

    def adopt(self, places: Iterable[int] | None = None) -> None:
        """Makes the gradients of these parameters, or of all, views of the buffer.

        Raises RuntimeError for a gradient that is sparse or has a graph.
        """
        absent, views, gradients = [], [], []
        for i in self._checked(places):
            parameter, view = self.parameters[i], self.views[i]
            if parameter.grad is None:
                absent.append(view)
            elif parameter.grad is not view:
                views.append(view)
                gradients.append(parameter.grad)
            parameter.grad = view
        with torch.no_grad():
            if absent:
                torch._foreach_zero_(absent)
            if views:
                torch._foreach_copy_(views, gradients)

    def check(self) -> None:
        super().check()
        places = zip(self.names, self.parameters, self.views, self._addresses, strict=True)
        for name, parameter, view, address in places:
            if view.data_ptr() != address:
                raise RuntimeError(
                    f"{name!r} was moved or cast after it was wrapped; do so before, or wrap again"
                )
            if self.finish is not None and parameter.grad is not view:
                raise RuntimeError(
                    f"the gradient of {name!r} was replaced or removed while it was sent; leave it "
                    "alone until finish_gradient_sync(), and wrap a module once"
                )


class Gradients:
    """The gradients of a module's trained parameters, followed by hooks.

    start(bucket): begins to send it, and returns what to call before its result is used.
    bucket(named): makes one, `Bucket` or `Loose`, of at most so many bytes (`most`). early: it is
    sent once its gradients are there, in the order of the buckets on every rank; else `finish`
    sends all. unused: see `UNUSED`.
    """

    def __init__(
        self,
        module: nn.Module,
        start: Callable[[Loose], Callable[[], None]],
        bucket: Callable[[dict[str, nn.Parameter]], Loose] = Bucket,
        *,
        most: float = inf,
        unused: str = "error",
        early: bool = False,
    ):
        self._start, self._early, self._unused = start, early, unused
        self.sending = True  # False: gradients are gathered, and sent with a later backward's
        named = {p: name for name, p in module.named_parameters() if p.requires_grad}
        self._frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
        parts = cut(list(named)[::-1], most)
        self.buckets = [bucket({named[p]: p for p in part}) for part in parts]
        self._sent = 0  # buckets of this step
        own = ref(self)  # parameters must not keep the buckets alive
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_arrived, own, ref(each), place))
            for each in self.buckets
            for place, parameter in enumerate(each.parameters)
        ]

    def __del__(self):
        for hook in getattr(self, "_hooks", ()):
            hook.remove()

    @property
    def begun(self) -> bool:
        """Whether there are gradients that `finish` has not seen."""
        return any(len(bucket.unused) < len(bucket.parameters) for bucket in self.buckets)

    def arrived(self, bucket: Loose, place: int) -> None:
        """A backward has made the gradient of a parameter, or added to it."""
        if bucket.finish is not None:
            raise RuntimeError(
                f"the gradient of {bucket.names[place]!r} was made again after it was sent; run "
                "all backwards of a step but the last inside no_sync(), and let no reentrant "
                "checkpoints share a parameter (use_reentrant=False), or use 'bucketed'"
            )
        bucket.unused.discard(place)
        if not self.sending:
            bucket.adopt((place,))
            return
        if bucket.device.type == "cuda":
            bucket.streams.add(torch.cuda.current_stream(bucket.device))
        if place not in bucket.missing:
            return
        bucket.missing.discard(place)
        if bucket.missing:
            return
        for stream in bucket.streams:
            torch.cuda.current_stream(bucket.device).wait_stream(stream)
        bucket.adopt()
        for stream in bucket.streams:  # to which the memory of what was copied goes back
            stream.wait_stream(torch.cuda.current_stream(bucket.device))
        if self._early:
            self._send(lambda bucket: not bucket.missing)

    def finish(self) -> None:
        """Sends what was not sent, and makes the current stream wait for all of it.

        Raises RuntimeError where a parameter was frozen, unfrozen, moved, or unused.
        """
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                raise RuntimeError(f"{name!r} was unfrozen after it was wrapped; wrap it again")
        for bucket in self.buckets:
            bucket.check()
        self._check_used()
        for bucket in self.buckets[self._sent :]:
            bucket.adopt()
        self._send(lambda bucket: True)
        for bucket in self.buckets:
            bucket.finish()
            bucket.renew()
        self._sent = 0

    def _send(self, ready: Callable[[Loose], bool]) -> None:
        while self._sent < len(self.buckets) and ready(self.buckets[self._sent]):
            bucket = self.buckets[self._sent]
            bucket.finish = self._start(bucket)
            self._sent += 1

    def _check_used(self) -> None:
        names = [bucket.names[i] for bucket in self.buckets for i in sorted(bucket.unused)]
        if names and not self.begun:  # sent now, it would be paired with another rank's next step
            raise RuntimeError(NO_BACKWARD)
        if names and self._unused == "error":
            raise RuntimeError(no_gradient(names))


def cut(tensors: list[Tensor], most: float) -> list[list[Tensor]]:
    """Parts of one dtype each, in order, of at most so many bytes or one tensor.

    The parts are in the order of their last tensors, for those of two dtypes may interleave.
    """
    parts, order = [], {id(tensor): place for place, tensor in enumerate(tensors)}
    by_dtype = sorted(tensors, key=lambda tensor: str(tensor.dtype))
    for _, same in groupby(by_dtype, key=lambda tensor: tensor.dtype):
        part, size = [], 0
        for tensor in same:
            if part and size + tensor.nbytes > most:
                parts.append(part)
                part, size = [], 0
            part.append(tensor)
            size += tensor.nbytes
        parts.append(part)
    return sorted(parts, key=lambda part: order[id(part[-1])])


def _arrived(own, bucket, place: int, _: Tensor) -> None:
    """The hook: without the objects themselves, which the wrapper owns."""
    gradients = own()
    if gradients is not None:
        gradients.arrived(bucket(), place)


def _not_plain(name: str, gradient: Tensor) -> str:
    if gradient.layout is not torch.strided:
        return (
            f"the gradient of {name!r} is sparse ({gradient.layout}), and buckets are dense; make "
            "its layer with sparse=False"
        )
    return (
        f"the gradient of {name!r} has a graph of its own; gradients in buckets have none, so call "
        "backward without create_graph"
    )
