"""Autograd of a layer Y = X Wᵀ (+ b) that is computed by all ranks of a group together.

X, dY, Y and dX are replicated: every rank gets the same X and dY, and returns the same bits. What a
rank computes is in its own products; two joins make one result of them (`joins`):

    forward    Y  = output.join( product(X) )
    backward   dX = input.join( input_gradient(dY) ), begun first, and hidden behind
               dW = weight_gradient(dY, X), in the form of the rank's own parameter
               db = Σ dY, on every rank

(Sum forward and gather backward, or the other way round, are the conjugate pairs f, g of
Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053, section 3.) No caller scales anything: a dense
layer computed by all ranks together counts once.

The bias is added once, in the float32 sums of a product's epilogue: by the first rank where
partials are summed, by each rank for its own columns where columns are joined. Added after the sum
over ranks it would cost another rounding of Y, √3 in place of √2 of plain dense's error, and
another pass over Y.
"""

import threading
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blockshock.distributed import collectives
from blockshock.distributed.exchange import Pending
from blockshock.distributed.joins import Gather, Sum
from blockshock.distributed.reduce import Plan


@dataclass(frozen=True)
class Way:
    """How a product and its join are done. kernel: None where the layer has no choice."""

    kernel: str | None
    plan: Plan

    def __str__(self) -> str:
        return f"{self.kernel}; {self.plan}" if self.kernel else str(self.plan)

    @property
    def asked(self) -> dict[str, str]:
        """The keyword for a layer's products."""
        return {"kernel": self.kernel} if self.kernel else {}


class Ways(Protocol):
    """Who chooses, for an input of these rows."""

    def forward(self, layer: "Layer", x: Tensor) -> Way:
        """x: [B, K]."""

    def backward(self, layer: "Layer", dy: Tensor, local: Tensor | None) -> Way:
        """local: the local input, if dW is computed as well, behind which the join is hidden."""


class Check(Protocol):
    """Who compares what should be replicated."""

    def look(self, what: str, tensor: Tensor, layer: "Layer") -> None:
        """what: "x" [B, K] or "dY" [B, N]. Raises ValueError where the ranks' are not the same."""


class Layer(Protocol):
    """What `apply` asks of a layer; B rows. A layer with kernels takes `kernel=` in the first
    three, and in the two products `partials=`, where one of its kernels adds (`reduce.begin_sum`).
    """

    ranks: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    added: Tensor | None  # the bias's values, in the products' dtype
    output: Sum | Gather
    input: Sum | Gather
    check: Check | None

    def prepare_gradients(self) -> None:
        """Called once before the products of a backward."""

    def local_input(self, x: Tensor) -> Tensor:
        """What this rank's products need of x [B, K]."""

    def product(self, x: Tensor) -> Tensor:
        """A partial of Y, or this rank's columns of it, bias added; x: rows of the local input."""

    def input_gradient(self, dy: Tensor) -> Tensor:
        """From dy [B, N]: a partial of dX, or this rank's part of it; contiguous."""

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """From dy [B, N] and the local input: in the form of the weight; autograd casts."""

    def as_part(self, gradient: Tensor) -> Tensor:
        """The gradient of the weight, as hooks and `torch.autograd.grad` get it."""


@torch.compiler.disable  # kernels, streams and collectives of its own: a break in a compiled graph
def apply(layer: Layer, x: Tensor, ways: Ways) -> Tensor:
    """Y [B, N] of x [B, K], which has the products' dtype and device.

    Raises RuntimeError where the layer's ranks are not there: a part alone gives a part of Y; and
    inside a transform of `torch.func`, which has no rule for sums over ranks.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "a layer of several ranks cannot be transformed by torch.func (vmap, grad, jvp); give "
            "it the whole batch, and use backward()"
        )
    ranks = collectives.group_size(layer.group)
    if ranks != layer.ranks:
        raise RuntimeError(
            f"the layer was built by {layer.ranks} ranks and its group has {ranks}; use it in the "
            "process group it was built in, or `revert` it there first"
        )
    if layer.check is not None:
        layer.check.look("x", x, layer)
    # Sums use streams and buffers of the current device; in a backward autograd has set it to x's.
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):  # in x's dtype
        return _Apply.apply(x, layer.weight, layer.bias, layer, ways)


def begin_forward(layer: Layer, x: Tensor, way: Way) -> tuple[Tensor, Pending]:
    """(the local input, Y on its way)."""
    local = layer.local_input(x, **way.asked)
    product = partial(layer.product, **way.asked)
    return local, layer.output.begin(product, local, way.plan)


def begin_backward(layer: Layer, dy: Tensor, way: Way, *, hide: bool) -> Pending:
    """dX on its way; hide: behind dW, which the caller computes before it waits."""
    product = partial(layer.input_gradient, **way.asked)
    return layer.input.begin(product, dy, way.plan, hide=hide)


def bias_of_first(layer: Layer) -> Tensor | None:
    """The bias for the product of the group's first rank, None for the others."""
    first = collectives.group_rank(layer.group) == 0
    return layer.added if first else None


_started = threading.local()


def _start_cuda(like: Tensor) -> None:
    """Makes the GPU's context current in autograd's own thread: cuBLAS warns if it has to."""
    if like.is_cuda and not hasattr(_started, "event"):
        _started.event = torch.cuda.current_stream(like.device).record_event()


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer, ways):
        _start_cuda(x)
        local, pending = begin_forward(layer, x, ways.forward(layer, x))
        # Saving the weight makes autograd refuse a backward after the weight was overwritten.
        ctx.save_for_backward(local if weight.requires_grad else None, weight)
        ctx.layer, ctx.ways, ctx.weight = layer, ways, weight
        return pending.wait()

    @staticmethod
    @once_differentiable  # a second derivative would not see the sums over ranks
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):  # a caller may be in one
            return _Apply.gradients(ctx, dy)

    @staticmethod
    def gradients(ctx, dy):
        _start_cuda(dy)  # before tensors are unpacked: a checkpoint then runs the forward here
        local, _ = ctx.saved_tensors
        layer, (need_x, need_weight, need_bias, *_) = ctx.layer, ctx.needs_input_grad
        if layer.weight is not ctx.weight:  # the layer multiplies by the one that it has
            raise RuntimeError(
                "the layer's weight is another tensor than in the forward of this backward; run "
                "the backward before it is replaced (by load_state_dict(assign=True), or at the "
                "end of functional_call)"
            )
        local, pending = local if need_weight else None, None
        if layer.check is not None:
            layer.check.look("dY", dy, layer)
        layer.prepare_gradients()
        dx = dw = None
        if need_x:
            way = ctx.ways.backward(layer, dy, local)
            pending = begin_backward(layer, dy, way, hide=need_weight)
        try:
            if need_weight:
                dw = layer.as_part(layer.weight_gradient(dy, local))
            db = dy.sum(0, dtype=layer.bias.dtype) if need_bias else None
        finally:  # whatever happens: other streams use memory that this one would take back
            if pending is not None:
                dx = pending.wait()
        return dx, dw, db, None, None
