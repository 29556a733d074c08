"""Which kernel multiplies and how the ranks' results are joined: chosen together, end to end.

    forward             local input, product, join
    backward            product, join
    backward, hidden    the join of dX behind dW

For an input of given rows every kernel the layer may take is combined with every plan its join may
take, and what was fastest in `tuning` is taken, at these rows or at others of their class. One
candidate alone is taken as it is.
"""

from dataclasses import replace

import torch
from torch import Tensor

from blockshock import tuning
from blockshock.distributed import functions
from blockshock.distributed.functions import Way
from blockshock.distributed.groups import ByGroup
from blockshock.distributed.reduce import Plan
from blockshock.tuning import Answer

FORWARD, BACKWARD, HIDDEN = "forward", "backward", "backward, hidden"


def forward(layer, x: Tensor) -> Way:
    """The way to Y of x [B, K]."""

    def step(way: Way):
        return lambda: functions.begin_forward(layer, x, way)[1].wait()

    def trial(way: Way):
        return lambda: layer.product(layer.local_input(x, **way.asked), **way.asked)

    def stand_in(twin):
        forward(twin, x.to(torch.bfloat16))

    return _chosen(layer, FORWARD, x, step, trial, stand_in)


def backward(layer, dy: Tensor, local: Tensor | None) -> Way:
    """The way to dX of dy [B, N]; local: the local input, where dW is computed as well."""

    def step(way: Way):
        def run():
            pending = functions.begin_backward(layer, dy, way, hide=local is not None)
            try:
                if local is not None:
                    layer.weight_gradient(dy, local)
            finally:
                pending.wait()

        return run

    def trial(way: Way):
        return lambda: layer.input_gradient(dy, **way.asked)

    def stand_in(twin):
        backward(twin, dy.bfloat16(), None if local is None else local.bfloat16())

    return _chosen(layer, BACKWARD if local is None else HIDDEN, dy, step, trial, stand_in)


def candidates(layer, side: str, like: Tensor) -> list[Way]:
    """All ways for `like`, the input of that side; the first by rule."""
    hide, rows = side == HIDDEN, (len(like), like.dtype, like.device)
    join = layer.output if side == FORWARD else layer.input
    kernels = _kernels(layer, side, len(like))[: None if len(like) else 1]  # nothing to multiply
    return [
        Way(kernel, plan)
        for kernel in kernels
        for plan in join.plans(*rows, hide=hide, by_tiles=kernel == "wide")
    ]


def paths(layer, batch: int) -> dict[str, str]:
    """For a method's `paths`: how results of so many rows were joined, and who chose it so."""
    forward, backward = used(layer, batch)
    return {"reduce": _told(*forward), "reduce_backward": _told(*backward)}


def used(layer, batch: int) -> tuple[tuple[Way, str], tuple[Way, str]]:
    """(way, who chose it) forward and backward, for so many rows."""
    like = layer.weight.new_empty(0, dtype=_dtype(layer)).expand(batch, 0)
    side = HIDDEN if layer.weight.requires_grad else BACKWARD
    return _known(layer, FORWARD, like), _known(layer, side, like)


def answers(layer, batch: int) -> dict[str, dict]:
    """For a result: the way of each direction that so many rows took, and who chose it."""
    like = layer.weight.new_empty(0, dtype=_dtype(layer)).expand(batch, 0)
    found = {}
    for side in (FORWARD, BACKWARD, HIDDEN):
        question, group = _question(layer, side, like), layer.group
        answer = tuning.known(question, group)
        if answer is None and len(only := _ways.of(group).get(question, ())) == 1:
            answer = Answer(next(iter(only)), "the only way")
        if answer is None and (ruled := _ruled.of(group).get(question)):
            answer = Answer(str(ruled), CAPTURED)
        if answer is not None:
            found[side] = {"question": question, "way": answer.name, "source": answer.source}
            found[side] |= {"seconds": answer.seconds, "took": answer.took}
            if answer.took:  # said once
                tuning.remember(question, replace(answer, took=0.0), group)
    return found


def _chosen(layer, side: str, like: Tensor, step, trial, stand_in) -> Way:
    question, group = _question(layer, side, like), layer.group
    by_name, answer = _ways.of(group).get(question), tuning.known(question, group)
    if by_name is not None and (answer is not None or len(by_name) == 1):
        return by_name[answer.name if answer else next(iter(by_name))]
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        way = _by_rule(layer, side, like)
        tuning.hold(_ruled.of(group), question, way)
        return way
    by_name = {str(way): way for way in candidates(layer, side, like)}
    tuning.hold(_ways.of(group), question, by_name)
    if answer is not None and answer.name in by_name:
        return by_name[answer.name]
    if len(by_name) == 1:
        return next(iter(by_name.values()))
    by_kernel: dict = {}
    for name, way in by_name.items():
        by_kernel.setdefault(str(way.kernel), {})[name] = step(way)
    trials = {str(way.kernel): trial(way) for way in by_name.values()}
    other = None
    if like.dtype == torch.float16 and "cusparselt" in by_kernel:
        # The library compiles each fp16 product anew, so bf16, of the same bytes, stands for it.
        def other():
            with torch.no_grad():
                stand_in(layer.in_dtype(torch.bfloat16))
            return tuning.known(question.replace("float16", "bfloat16"), group)

    device = like.device
    found = tuning.pick(question, by_kernel, device, group, trials=trials, stand_in=other)
    return by_name[found.name]


CAPTURED = "by rule: a graph was being captured"
_ways = ByGroup(dict)  # of a group, by question: {name: Way}
_ruled = ByGroup(dict)  # of a group, by question: the Way that a capture took


def _by_rule(layer, side: str, like: Tensor) -> Way:
    """Inside a capture, where nothing can be measured and no rank can be asked."""
    join = layer.output if side == FORWARD else layer.input
    if layer.ranks > 1 and join.how not in ("auto", "collective"):
        raise RuntimeError(
            f"the sum {join.how!r} of {len(like)} rows was not used yet and a graph is being "
            "captured; run this shape once before the capture"
        )
    return Way(_kernels(layer, side, len(like))[0], Plan("collective"))


def _known(layer, side: str, like: Tensor) -> tuple[Way, str]:
    question, group = _question(layer, side, like), layer.group
    answer, by_name = tuning.known(question, group), _ways.of(group).get(question, {})
    if answer is not None and answer.name in by_name:
        return by_name[answer.name], answer.source
    if not by_name and (ruled := _ruled.of(group).get(question)):
        return ruled, CAPTURED
    return candidates(layer, side, like)[0], ""


def _told(way: Way, source: str) -> str:
    return str(way.plan) + (f" ({source})" if source.startswith("by rule") else "")


def _kernels(layer, side: str, rows: int) -> tuple[str | None, ...]:
    kernels = getattr(layer, "candidates", None)
    return kernels(rows, backward=side != FORWARD) if kernels else (None,)


def _question(layer, side: str, like: Tensor) -> str:
    join = layer.output if side == FORWARD else layer.input
    asked = f", kernel={layer.kernel}" if hasattr(layer, "kernel") else ""
    return (
        f"{getattr(layer, 'kind', type(layer).__name__)} {side}: N={layer.output.columns} "
        f"K={layer.input.columns} B={len(like)} {str(like.dtype).removeprefix('torch.')} "
        f"ranks={layer.ranks}{asked}, reduce={join.how}{'' if like.is_cuda else ', no GPU'}"
    )


def _dtype(layer) -> torch.dtype:
    return layer.packed.values.dtype if hasattr(layer, "packed") else layer.weight.dtype
