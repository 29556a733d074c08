"""What strangers do with a supermask layer: save, copy, average, cast, compile, capture."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from blockshock.block_sparse.supermask import SupermaskLinear

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_a_state_loads_whole_and_is_refused_by_another_block():
    first = SupermaskLinear(12, 12, block=5, sparsity=0.5)
    with torch.no_grad():
        first.scores.copy_(torch.randn(3, 3))
    second = SupermaskLinear(12, 12, block=5, sparsity=0.0)
    second.load_state_dict(first.state_dict())
    assert second.sparsity == first.sparsity
    assert torch.equal(second.mask, first.mask)
    x = torch.randn(2, 12)
    assert torch.equal(second(x), first(x))
    other = SupermaskLinear(12, 12, block=4, sparsity=0.5)  # scores of the same shape
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match=r"1: the state has scores of tiles \(5, 5\), the layer"):
        nn.Sequential(second, other).load_state_dict(
            nn.Sequential(first, first).state_dict(), strict=False
        )
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*scores"):
        other.load_state_dict(nn.Linear(12, 12).state_dict())


def test_a_share_of_the_scores_has_no_mask():
    layer = SupermaskLinear(12, 12, block=4, sparsity=0.5)
    layer.scores.data = layer.scores.data.flatten()[:5]
    with pytest.raises(RuntimeError, match=r"scores \[5\] are a share of \[3, 3\]"):
        _ = layer.mask


def test_a_deep_copy_is_independent():
    layer = SupermaskLinear(12, 12, block=4, sparsity=0.5)
    twin = copy.deepcopy(layer)
    layer.sparsity = 0.0
    with torch.no_grad():
        layer.scores.neg_()
    assert twin.sparsity == 1 - 5 / 9
    assert int(twin.mask.sum()) == 5
    assert (twin.scores > 0).all()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_keeps_as_many_tiles(use_buffers):
    layer = SupermaskLinear(33, 29, block=4, sparsity=0.7)
    average = AveragedModel(
        layer, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=use_buffers
    )
    for _ in range(20):
        average.update_parameters(layer)
    assert average.module.sparsity == layer.sparsity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_layer_keeps_as_many_tiles(dtype):
    layer = SupermaskLinear(33, 29, block=4, sparsity=0.7)
    before = layer.sparsity
    assert layer.to(dtype).sparsity == before
    assert layer(torch.ones(2, 33, dtype=dtype)).dtype == dtype


def test_inside_autocast_the_product_is_bf16_and_the_gradients_are_the_parameters():
    torch.manual_seed(0)
    layer = SupermaskLinear(64, 48, block=16, sparsity=0.5)
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    true = F.linear(x.bfloat16(), layer.masked_weight().bfloat16(), layer.bias.bfloat16())
    assert torch.equal(y, true)
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_compiled_whole_it_follows_sparsity_and_scores_without_another_graph():
    torch._dynamo.reset()
    layer, graphs = SupermaskLinear(40, 24, block=8, sparsity=0.0), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    run = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(6, 40)
    for sparsity in (0.0, 0.2, 0.4, 0.6, 0.8):
        layer.sparsity = sparsity
        twin = copy.deepcopy(layer)
        assert torch.equal(run(x), twin(x))
        layer.zero_grad()
        run(x).pow(2).sum().backward()
        twin.zero_grad()
        twin(x).pow(2).sum().backward()
        for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        with torch.no_grad():
            layer.scores.copy_(torch.randn_like(layer.scores))
    assert len(graphs) == 1


class NoWaiting(TorchDispatchMode):
    """Refuses operators whose result the host needs before it can go on."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.waits, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def step(layer, x):
    layer.sparsity = 0.6
    layer(x).sum().backward()


def test_no_step_waits_for_the_device():
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(1).item()
    for block in (8, 7):
        layer = SupermaskLinear(40, 24, block=block, sparsity=0.5)
        with NoWaiting():
            step(layer, torch.randn(6, 40))


@on_gpu
def test_no_step_waits_for_a_gpu():
    for block in (8, 7):
        layer = SupermaskLinear(40, 24, block=block, sparsity=0.5, device="cuda")
        x = torch.randn(6, 40, device="cuda")
        step(layer, x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(layer, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_captured_forward_follows_sparsity_and_scores():
    layer = SupermaskLinear(64, 64, block=16, sparsity=0.0, device="cuda")
    x = torch.randn(8, 64, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for sparsity in (0.25, 0.75):
            layer.sparsity = sparsity
            layer.scores.copy_(torch.randn_like(layer.scores))
            graph.replay()
            assert torch.equal(y, layer(x))
