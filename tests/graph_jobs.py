"""What the ranks do in the tests of layers in CUDA graphs; the tests judge the answers."""

import copy
import gc

import torch

import blockshock
from blockshock.kernels import graphs
from blockshock.measure.clock import capture
from blockshock.measure.errors import relative_error
from tests.outside_jobs import built, inputs

REPLAYS = 3


def pair(method, options):
    """Two equal converted models."""
    eager = built()
    blockshock.convert(eager, method, **options)
    return eager, copy.deepcopy(eager)


def optimizer_of(net):
    """Fused, so that no version counter tells of its steps."""
    # So large an eps that gradients which are zero but for rounding move nothing.
    options = {"lr": 0.01, "eps": 1.0, "fused": True, "capturable": True}
    return torch.optim.Adam(net.parameters(), **options)


def differences(own, true, start, **others):
    """Of the changes of each parameter since `start`, of outputs in evaluation, and of others."""
    for net in (own, true):
        net.zero_grad()  # nothing but the past says that the weights may have been written
    x, _ = inputs(seed=5)
    with torch.no_grad():
        others["evaluated"] = own(x), true(x)
    after = dict(own.named_parameters()), dict(true.named_parameters())
    for name, before in start.items():
        others[name] = tuple(now[name].detach() - before for now in after)
    return {name: relative_error(*both) for name, both in others.items()}


def start_of(net):
    """A copy of each parameter."""
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def captured(method, options):
    """How far replayed steps of one CUDA graph are from eager ones."""
    eager, net = pair(method, options)
    start, (x, dy) = start_of(eager), inputs()

    def step_of(net):
        x_in, adam = x.clone().requires_grad_(), optimizer_of(net)

        def step():
            adam.zero_grad(set_to_none=True)
            x_in.grad = None
            net(x_in).backward(dy)
            adam.step()

        return step, x_in

    step, eager_x = step_of(eager)
    for _ in range(REPLAYS + 1):  # a capture warms up with one step
        step()
    step, net_x = step_of(net)
    graph = capture(step)
    for _ in range(REPLAYS):
        graph.replay()
    torch.cuda.synchronize()
    return differences(net, eager, start, x=(net_x.grad, eager_x.grad))


def graphed(method, options):
    """The same of `torch.cuda.make_graphed_callables`, with an eager optimizer."""
    eager, net = pair(method, options)
    start, (x, dy) = start_of(eager), inputs()
    sample = x.clone().requires_grad_()
    gc.collect()
    gc.disable()  # it would end the capture where it destroyed an earlier graph
    try:
        fast = torch.cuda.make_graphed_callables(copy.deepcopy(net), (sample,))
    finally:
        gc.enable()
    grads = {}
    for role, model in (("eager", eager), ("own", fast)):
        adam = optimizer_of(model)
        for _ in range(REPLAYS):
            adam.zero_grad()
            x_in = x.clone().requires_grad_()
            model(x_in).backward(dy)
            adam.step()
        grads[role] = x_in.grad.clone()
    return differences(fast, eager, start, x=(grads["own"], grads["eager"]))


def evaluation_between_training(method, options):
    """How far a captured evaluation is from an eager one, after the weights were trained on."""
    eager, net = pair(method, options)
    x, dy = inputs()
    adam, found = optimizer_of(net), {}
    for model in (eager, net):
        with torch.no_grad():
            model(x)

    def evaluate():
        with torch.no_grad():
            found["y"] = net(x)

    graph = capture(evaluate)
    x_in = x.clone().requires_grad_()
    net(x_in).backward(dy)
    adam.step()
    adam.zero_grad()
    graph.replay()
    torch.cuda.synchronize()
    replayed = found["y"].clone()
    with torch.no_grad():
        return relative_error(replayed, net(x)), relative_error(replayed, eager(x))


def loaded_after_a_capture(method, options, trained):
    """How far replays of a captured evaluation are from an eager one, after values were loaded."""
    eager, net = pair(method, options)
    (x, _), found = inputs(), {}
    net.requires_grad_(trained)

    def evaluate():
        with torch.no_grad():
            found["y"] = net(x)

    graph = capture(evaluate)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.mul_(-2)
        net.load_state_dict(eager.state_dict())
        graph.replay()
        torch.cuda.synchronize()
        return relative_error(found["y"], eager(x))


def eager_after_a_capture(method, options):
    """How far a frozen layer's Y is from its weight's, where a capture alone followed a write."""
    eager, net = pair(method, options)
    x, _ = inputs()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        for model in (eager, net):
            model.requires_grad_(False)(x)
            for parameter in model.parameters():
                parameter.mul_(-2)
        torch.cuda.synchronize()
        with graphs.capturing(graph, stream):
            net(x)
        return relative_error(net(x), eager(x))


def captured_too_early(method, options):
    """What is said where a captured step is the optimizer's first one."""
    net, (x, dy) = pair(method, options)[0], inputs()
    net(x).backward(dy)
    adam = optimizer_of(net)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        with graphs.capturing(graph, stream):
            adam.step()
    except RuntimeError as error:
        return str(error)
    return None
