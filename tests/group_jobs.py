"""What the ranks do in the tests of streams and groups; the tests compare the answers."""

import gc

import torch
import torch.distributed as dist

from blockshock.distributed import groups, symmetric
from blockshock.distributed.ranks import device
from blockshock.linear import METHODS
from blockshock.measure.clock import capture


def made_and_destroyed():
    """Whether a group exists, before and after its end."""
    group = dist.new_group()
    before = groups.exists(group)
    dist.destroy_process_group(group)
    return before, groups.exists(group)


def _pair(how, N=2048):
    torch.manual_seed(0)
    like = {"dtype": torch.bfloat16, "device": device()}
    made = METHODS["block_shock"].from_dense
    return [made(torch.randn(N, N, **like), mask="1100", reduce=how) for _ in range(2)]


def _inputs(rows, N=2048):
    torch.manual_seed(rows)
    like = {"dtype": torch.bfloat16, "device": device()}
    return [torch.randn(rows, N, **like).requires_grad_() for _ in range(2)]


def _step(layer, x):
    """(Y, dX) of one call; dW is computed beside dX."""
    y = layer(x)
    dx, _ = torch.autograd.grad(y, (x, layer.weight), torch.ones_like(y))
    return y.detach(), dx


def in_two_streams(how):
    """How many results of two layers of one group, each in its own stream, are wrong."""
    layers, wrong = _pair(how), 0
    streams = [torch.cuda.Stream() for _ in layers]
    for rows in (64, 256, 2048):
        xs = _inputs(rows)
        true = [[t.clone() for t in _step(*pair)] for pair in zip(layers, xs, strict=True)]
        torch.cuda.synchronize()
        for turn in range(30):
            found = {}
            for i in (0, 1) if turn % 2 else (1, 0):
                streams[i].wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(streams[i]):
                    if (turn + dist.get_rank() + i) % 3 == 0:
                        torch.cuda._sleep(200_000)  # about 0.1 ms
                    found[i] = _step(layers[i], xs[i])
            torch.cuda.synchronize()
            for i, results in found.items():
                pairs = zip(results, true[i], strict=True)
                wrong += sum(not torch.equal(a, b) for a, b in pairs)
    return wrong


def captured_in_two_streams(how):
    """How many outputs of a graph whose two branches are two layers of one group are wrong."""
    layers, wrong, found = _pair(how), 0, {}
    xs = [x.detach() for x in _inputs(256)]
    side = torch.cuda.Stream()

    def step():
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            found[0] = layers[0](xs[0])
        found[1] = layers[1](xs[1])
        with torch.cuda.stream(side):
            found[2] = layers[0](xs[1])
        main.wait_stream(side)

    with torch.no_grad():
        calls = ((0, 0), (1, 1), (0, 1))
        true = [layers[layer](xs[x]).clone() for layer, x in calls]
        graph = capture(step)
        for _ in range(30):
            graph.replay()
            torch.cuda.synchronize()
            wrong += sum(not torch.equal(found[i], y) for i, y in enumerate(true))
    return wrong


def groups_that_come_and_go(count, kept_alive):
    """(shared bytes, used bytes of the device), while each of so many groups exists.

    kept_alive: the layers, which refer to their groups, stay.
    """
    held, used, layers = [], [], []
    x = torch.randn(256, 512, dtype=torch.bfloat16, device=device())
    weight = torch.randn(512, 512, dtype=torch.bfloat16, device=device())
    for _ in range(count):
        group = dist.new_group()
        layer = METHODS["dense_tp_row"].from_dense(weight, group=group, reduce="exchange")
        with torch.no_grad():
            layer(x)
        torch.cuda.synchronize()
        held.append(symmetric.held_bytes())
        free, total = torch.cuda.mem_get_info()
        used.append(total - free)
        dist.destroy_process_group(group)
        if kept_alive:
            layers.append(layer)
        del layer, group
        gc.collect()
    return held, used
