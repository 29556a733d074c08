"""What the ranks do in the tests of what they must have alike; the tests judge the answers."""

import warnings
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import blockshock
from blockshock.distributed import collectives
from blockshock.distributed.ranks import device
from blockshock.linear import METHODS, alike


def dtype() -> torch.dtype:
    """What the models here have on this rank's device."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def built(dropout=0.0) -> nn.Module:
    """Two layers that every method holds, with the same values on all ranks."""
    torch.manual_seed(0)
    layers = nn.Linear(128, 128), nn.Dropout(dropout), nn.Linear(128, 64)
    return nn.Sequential(*layers).to(device(), dtype())


def batch(seed=1, rows=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 128, generator=generator).to(device(), dtype())


def said(function, *args, **options) -> str | None:
    """What an error says, with its kind, or None."""
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def last() -> bool:
    return collectives.group_rank() == collectives.group_size() - 1


def _weight(net):
    with torch.no_grad():
        net[2].weight[0, 0] += 1


def _bias(net):
    net[2].bias.data[5] = -net[2].bias.data[5]


def _swapped(net):
    net[2].weight.data[:2] = net[2].weight.data[:2].flip(0)


OTHER_MODELS = {
    "weight": _weight,
    "swapped rows": _swapped,
    "bias": _bias,
    "hook": lambda net: net[2].register_forward_hook(lambda *_: None),
    "frozen": lambda net: net[2].weight.requires_grad_(False),
    "frozen bias": lambda net: net[2].bias.requires_grad_(False),
    "eval": lambda net: net[2].eval(),
    "dtype": lambda net: net[2].double(),
    "no bias": lambda net: setattr(net[2], "bias", None),
    "size": lambda net: net.__setitem__(2, nn.Linear(128, 128).to(device(), dtype())),
    "one more": lambda net: net.append(nn.Linear(64, 64).to(device(), dtype())),
    "one less": lambda net: net.pop(2),
}
OTHER_CALLS = {
    "where": {"where": "0"},
    "failing where": {"where": lambda name, layer: 1 / 0},
    "wrong where": {"where": 3},
    "mask": {"mask": "1010"},
    "unknown mask": {"mask": "0110"},
    "unknown option": {"colour": "red"},
    "seed": {"seed": 3},
    "reduce": {"reduce": "collective"},
}
# What the error has, where it is not the name of the option.
SAID = {
    "where": "asked for",
    "failing where": "division",
    "wrong where": "where = 3",
    "unknown mask": "0110",
    "unknown option": "colour",
}


def other_model(kind):
    """What is said where the last rank has another model, and whether it is as it was."""
    net = built()
    if last():
        OTHER_MODELS[kind](net)
    before = list(net)
    return said(blockshock.convert, net, "block_shock"), list(net) == before


def other_call(kind):
    net = built()
    before = list(net)
    options = {"mask": "1100"} | (OTHER_CALLS[kind] if last() else {})
    return said(blockshock.convert, net, "block_shock", **options), list(net) == before


def other_method():
    return said(blockshock.convert, built(), "masked_split" if last() else "dense_tp_row")


def cannot_build():
    """The last rank fails in building its second layer."""
    net, cls = built(), METHODS["dense_tp_row"]
    before, from_dense, own = list(net), cls.from_dense, vars(cls)["from_dense"]

    def failing(weight, bias=None, **options):
        if len(weight) == 64 and last():
            raise torch.OutOfMemoryError("no memory")
        return from_dense(weight, bias, **options)

    cls.from_dense = failing
    try:
        return said(blockshock.convert, net, "dense_tp_row"), list(net) == before
    finally:
        cls.from_dense = own  # not bound to this class: others are made of it


def does_not_come():
    """The first rank alone calls convert, and does not wait for long."""
    patience, alike.PATIENCE = alike.PATIENCE, 0.5
    try:
        return None if last() else said(blockshock.convert, built(), "dense_tp_row")
    finally:
        alike.PATIENCE = patience
        dist.barrier()


def reverted_otherwise(kind):
    """The last rank's model has a hook, or lost a layer, when it is reverted."""
    net = built()
    blockshock.convert(net, "dense_tp_row")
    if last():
        if kind == "hook":
            net[0].register_forward_hook(lambda *_: None)
        else:
            net[0] = nn.Linear(128, 128)
    before = list(net)
    return said(blockshock.revert, net), list(net) == before


@lru_cache(maxsize=1)
def first_alone():
    return dist.new_group([0])


def not_in_the_group():
    group = first_alone()
    return said(blockshock.convert, built(), "dense_single", group=group)


def _steps(net, kind, call):
    """One call of a model, in which the last rank differs by `kind`."""
    other = last()
    x = batch(seed=2 if other and kind == "data" else 1)
    if kind == "one row" and other:
        x[5] += batch(seed=3)[5]
    if kind == "rounding" and other:
        x = (x.double() * (1 + 2**-9)).to(x)
    if kind == "rows" and other:
        x = x[:7]
    if kind == "nan":
        x[3] = float("nan")
    if kind == "nan on one" and other:
        x[3, 7] = float("nan")
    if kind == "dropout":
        torch.manual_seed(10 * call + other)
    if kind == "other layer" and other:
        return net[2](net[0](x).detach()) if call else net[2](x)
    y = net(x)
    scale = -1.0 if kind == "loss" and other else 1.0
    if y.requires_grad:
        y.backward(torch.full_like(y, scale))
    return y


def inputs(method, kind, dropout=0.0):
    """What is said of the first step of a converted model, by kind of difference."""
    net = built(dropout)
    blockshock.convert(net, method)
    return said(_steps, net, kind, 0)


def calls(every, kind, steps):
    """What is said of each step, where the last rank is given other data from the second on."""
    net = built()
    blockshock.convert(net, "dense_tp_row")
    if every:
        blockshock.check_inputs(net, every)
    return [said(_steps, net, kind if call else "", call) for call in range(steps)]


def in_training_after_eval():
    """An evaluation is alike, the first step of training has other dropout."""
    net = built(0.5).eval()
    blockshock.convert(net, "dense_tp_row")
    with torch.inference_mode():
        first = said(_steps, net, "dropout", 0)
    net.train()
    return first, said(_steps, net, "dropout", 1)


def recomputed():
    """Activations are computed again in the backward: the same calls on all ranks."""
    net = built()
    blockshock.convert(net, "block_shock")
    blockshock.check_inputs(net)
    x = batch().requires_grad_()
    checkpoint(net, x, use_reentrant=False).sum().backward()
    return bool(x.grad.isfinite().all())


def captured(every):
    """What is said of a capture after the first calls."""
    net = built()
    blockshock.convert(net, "dense_tp_row")
    blockshock.check_inputs(net, every)
    x, stream = batch(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        net(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()

        def capture():
            with torch.cuda.graph(graph, stream=stream):
                net(x + 1)  # no graph may be empty

        return said(capture)


def wrapped_before():
    """What is warned of where data parallelism was built around the dense model."""
    net = built()
    wrapper = nn.parallel.DistributedDataParallel(net)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        blockshock.convert(net, "dense_tp_row")
    return [str(one.message) for one in told if type(wrapper).__name__ in str(one.message)]


def there_and_back(method, kind, options):
    """dtypes, flags and values after convert and revert."""
    wide = getattr(torch, kind)
    net = built().to(wide).requires_grad_(False)
    net[0].bias.requires_grad_(True)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    blockshock.convert(net, method, **options)
    y = net(batch().to(wide))
    blockshock.revert(net)
    same = all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    return (
        y.dtype == wide and same and all(p.dtype == wide for p in net.parameters()),
        [name for name, p in net.named_parameters() if p.requires_grad],
    )
