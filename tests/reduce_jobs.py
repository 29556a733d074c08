"""What the ranks do in the tests of sums and gathers over ranks; the tests compare the answers.

A partial is made from its rank and the number of its call, so every rank knows what the others
send, and the truth without a collective.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from blockshock.distributed import collectives, joins, reduce
from blockshock.distributed.ranks import device
from blockshock.distributed.reduce import Plan
from blockshock.kernels import add, columns
from blockshock.linear import parts
from blockshock.measure.clock import capture

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Call(NamedTuple):
    """A sum of [B, N] in a way, or (how "gather") such parts side by side.

    chunks: of an exchange, or None for all that `reduce.plans` says, by the number of the call.
    """

    how: str
    chunks: int | None
    B: int
    N: int
    dtype: str = "bf16"
    hide: bool = False


def part(rank, number, call):
    """What a rank contributes to a call."""
    generator = torch.Generator(device()).manual_seed(1000 * number + rank)
    made = torch.randn(call.B, call.N, generator=generator, device=device())
    return made.to(DTYPES[call.dtype])


def begin(call, x, product, number=0):
    """Starts the call; product takes some rows of x."""
    ranks = dist.get_world_size()
    if call.how == "gather":
        gather = joins.Gather("exchange", ranks * call.N, joins.side_by_side)
        return gather.begin(product, x, Plan("exchange", 1), hide=call.hide)
    if call.chunks is None:
        join = joins.Sum(call.how, call.N)
        plans = join.plans(call.B, x.dtype, x.device, hide=call.hide)
        return join.begin(product, x, plans[number % len(plans)], hide=call.hide)
    chunks = min(call.chunks, max(1, call.B // ranks))
    return reduce.begin_sum(product, x, Plan(call.how, chunks), hide=call.hide)


def problem(number, call, found):
    """What is wrong with a call's result, or None."""
    ranks = dist.get_world_size()
    terms = [part(rank, number, call) for rank in range(ranks)]
    if call.how == "gather":
        truth = torch.cat(terms, dim=1)
    else:
        truth = add.add_in_order_reference(terms)
    what = f"call {number}, {call}"
    if found.shape != truth.shape or found.dtype != truth.dtype:
        return f"{what}: {found.dtype} {tuple(found.shape)}"
    if not collectives.same_on_all_ranks(found):
        return f"{what}: the ranks do not have the same bits"
    if ranks == 2 or call.how in ("exchange", "gather"):  # else the order is the backend's
        wrong = int((found != truth).sum())
        return f"{what}: {wrong} of {truth.numel()} entries are wrong" if wrong else None
    exact = sum(term.double() for term in terms)
    far = (found.double() - exact).norm() > 2 * torch.finfo(found.dtype).eps * exact.norm()
    return f"{what}: far from the sum" if far else None


def lag(cycles, number):
    """One rank after the other is slow for a while."""
    if cycles and number % dist.get_world_size() == dist.get_rank():
        torch.cuda._sleep(cycles)


def storm(calls, repeat=1, cycles=0):
    """Runs the calls one after the other, `repeat` times, and looks at the results only then.

    cycles: so long one rank sleeps before a call, within its products, and before it reads the
    result. Returns what is wrong.
    """
    calls = [Call(*call) for call in calls] * repeat
    inputs = [part(dist.get_rank(), number, call) for number, call in enumerate(calls)]
    found = []
    dist.barrier()

    def product(rows, number):
        made = rows.clone()
        lag(cycles, number + 1)
        return made

    for number, (call, x) in enumerate(zip(calls, inputs, strict=True)):
        poison = [torch.full_like(x, torch.nan) for _ in range(3)]
        del poison  # partials and results come from this memory
        lag(cycles, number)
        pending = begin(call, x, partial(product, number=number), number)
        if call.hide:
            lag(cycles, number + 1)
            x.new_full((64, 64), 1) @ x.new_full((64, 64), 1)
        total = pending.wait()
        lag(cycles, number + 1)
        found.append(total.clone())  # its own memory is free for the next call at once
        del total, pending
    problems = [problem(i, call, y) for i, (call, y) in enumerate(zip(calls, found, strict=True))]
    return [text for text in problems if text]


def replay(calls, replays):
    """The calls in one CUDA graph, replayed with other inputs without a pause; what is wrong."""
    calls = [Call(*call) for call in calls]
    inputs = [part(dist.get_rank(), 0, call) for call in calls]
    results = {}

    def step():
        for i, (call, x) in enumerate(zip(calls, inputs, strict=True)):
            results[i] = begin(call, x, torch.clone).wait()

    graph = capture(step)
    numbers = [[1 + r * len(calls) + i for i in range(len(calls))] for r in range(replays)]
    fresh = [
        [part(dist.get_rank(), n, call) for n, call in zip(row, calls, strict=True)]
        for row in numbers
    ]
    dist.barrier()
    found = []
    for row in fresh:
        for x, new in zip(inputs, row, strict=True):
            x.copy_(new)
        for i in range(len(calls)):
            results[i].fill_(torch.nan)
        graph.replay()
        found.append([results[i].clone() for i in range(len(calls))])
    problems = [
        problem(n, call, y)
        for row, answers in zip(numbers, found, strict=True)
        for n, call, y in zip(row, calls, answers, strict=True)
    ]
    # The buffers are as good after the replays as before.
    return [text for text in problems if text] + storm([tuple(call) for call in calls])


def plans(asked):
    """The plans for each (how, rows, columns, dtype), as text."""
    return [
        [str(plan) for plan in reduce.plans(how, rows, width, DTYPES[dtype], device())]
        for how, rows, width, dtype in asked
    ]


def gathered(place, how, B, hide, dtype="fp32"):
    """Whether a gather puts the parts of all ranks in their places, and its plan."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    width, places = 12, (1, 3)
    if place == "side_by_side":
        own = [part(r, 0, Call(how, None, B, 20, dtype)) for r in range(ranks)]
        truth, put = torch.cat(own, dim=1), joins.side_by_side
    elif place == "add_pairs":
        own = [part(r, 0, Call(how, None, B, width, dtype)) for r in range(ranks)]
        pairs = zip(own[::2], own[1::2], strict=True)
        truth, put = torch.cat([a + b for a, b in pairs], dim=1), parts.add_pairs
    else:
        truth = part(0, 0, Call(how, None, B, width * (ranks // 2), dtype))
        shards = [truth[:, s * width : (s + 1) * width] for s in range(ranks // 2)]
        both = (places, columns.others(places))
        own = [columns.take_reference(shards[r // 2], both[r % 2]) for r in range(ranks)]
        put = partial(parts.place_pairs, places=places)
    gather = joins.Gather(how, truth.shape[1], put)
    turned = own[rank].t().contiguous().t()  # a product need not be contiguous
    plans = gather.plans(B, DTYPES[dtype], device(), hide=hide)
    results = [
        gather.begin(lambda x: x, given, plan, hide=hide).wait().clone()
        for given in (own[rank], turned)
        for plan in plans
    ]
    right = all(torch.equal(result, truth) for result in results)
    same = all(collectives.same_on_all_ranks(result) for result in results)
    return right and same


def storm_with_a_lost_part(calls):
    """`storm`, where the last rank's parts are lost."""
    whole = torch.clone
    lost = dist.get_rank() == dist.get_world_size() - 1
    found = []
    for number, call in enumerate(Call(*call) for call in calls):
        x = part(dist.get_rank(), number, call)
        y = begin(call, x, torch.zeros_like if lost else whole).wait()
        found.append(problem(number, call, y))
    return [text for text in found if text]
