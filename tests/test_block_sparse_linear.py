"""The block-sparse layer is the masked dense layer: outputs, every gradient, training, states."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from blockshock.block_sparse import tiles
from blockshock.block_sparse.linear import BlockSparseLinear
from blockshock.kernels import block_product
from tests.block_sparse_checks import ACTIVATIONS, DEVICE, HALVES, problems, relative, truth, whole

HALF = torch.finfo(HALVES[0]).eps
activations = st.sampled_from(list(ACTIVATIONS))


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def made(N=100, K=70, block=16, dtype=torch.float64, bias=True, **options):
    if "mask" not in options:
        options = {"sparsity": 0.5} | options
    weight, added = normal(N, K, dtype=dtype), normal(N, seed=1, dtype=dtype)
    return BlockSparseLinear.from_dense(weight, added if bias else None, block=block, **options)


def results(layer, x, dy):
    """y, dx, dw at the kept tiles, db."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, layer.values.grad, None if layer.bias is None else layer.bias.grad


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(), activation=activations, bias=st.booleans())
def test_output_and_every_gradient_are_the_masked_dense_layers(problem, activation, bias):
    block, mask, N, K, B = problem
    weight, added = normal(N, K), normal(N, seed=1) if bias else None
    layer = BlockSparseLinear.from_dense(
        weight, added, block=block, mask=mask, activation=activation
    )
    x, dy = normal(B, K, seed=2), normal(B, N, seed=3)
    found = results(layer, x, dy)
    true = truth(weight, added, mask, block, x, dy, activation)
    true = *true[:2], layer.restrict(true[2])["values"], true[3]
    for own, exact in zip(found, true, strict=True):
        assert (own is None) == (exact is None)
        if own is not None:
            torch.testing.assert_close(own, exact)
    masked = weight * tiles.expand(mask, (N, K), (block, block))
    assert torch.equal(layer.to_dense(), masked)


@settings(max_examples=40 if DEVICE == "cuda" else 6, deadline=None, derandomize=True)
@given(problem=problems((16, 32)), activation=activations, bias=st.booleans())
def test_the_kernels_match_float64_as_well_as_plain_dense_does(problem, activation, bias):
    block, mask, N, K, B = problem
    dtype = HALVES[-1]
    weight, added = normal(N, K, dtype=dtype), normal(N, seed=1, dtype=dtype) if bias else None
    layer = BlockSparseLinear.from_dense(
        weight, added, block=block, mask=mask, activation=activation, kernel="triton"
    )
    x, dy = normal(B, K, seed=2, dtype=dtype), normal(B, N, seed=3, dtype=dtype)
    found = results(layer, x, dy)
    true = list(truth(weight, added, mask, block, x, dy, activation))
    true[2] = layer.restrict(true[2])["values"]
    plain = copy.deepcopy(layer)
    plain.kernel = "torch"
    slack = 1 + 3 * min(t.numel() for t in found if t is not None) ** -0.5  # chance in few entries
    for own, yardstick, exact in zip(found, results(plain, x, dy), true, strict=True):
        if own is not None:
            assert own.dtype == dtype
            limit = max(1.5 * slack * relative(yardstick, exact), torch.finfo(dtype).eps)
            assert relative(own, exact) <= limit


def test_derivatives_of_the_kernels_have_derivatives():
    w, x, dy, v = (normal(*s, seed=i) for i, s in enumerate([(40, 50), (9, 50), (9, 40), (9, 50)]))

    def penalties(layer, dtype):
        own = x.to(dtype).requires_grad_()
        y = layer(own)
        (dx,) = torch.autograd.grad(y, own, dy.to(dtype), create_graph=True)
        loss = (dx * v.to(dtype)).sum() + (dx * dx).sum()
        return torch.autograd.grad(loss, [own, layer.values, layer.bias], allow_unused=True)

    for activation in ACTIVATIONS:
        pairs = []
        for dtype, kernel in ((torch.float64, "torch"), (HALVES[0], "triton")):
            layer = BlockSparseLinear.from_dense(
                w.to(dtype), w[:, 0].to(dtype), block=16, sparsity=0.3, activation=activation,
                kernel=kernel,
            )  # fmt: skip
            pairs.append(penalties(layer, dtype))
        for exact, own in zip(*pairs, strict=True):
            if activation == "gelu":  # a piecewise linear layer's dX does not depend on X
                assert own is not None
            exact, own = (t if t is not None else torch.zeros(1) for t in (exact, own))
            assert relative(own, exact) < 0.02


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    asked = []
    for name in ("product", "gradient"):
        run = getattr(block_product, name)
        monkeypatch.setattr(
            block_product, name, lambda *a, n=name, r=run, **o: asked.append(n) or r(*a, **o)
        )
    layer = made(dtype=HALVES[0], kernel="triton")
    x = normal(5, 70, dtype=HALVES[0])
    layer(x).sum().backward()
    assert asked == ["product", "gradient"]
    asked.clear()
    layer.values.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert asked == ["product", "product"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_in_sparse_form_is_training_under_the_mask(optimizer):
    layer = made(activation="gelu")
    mask = tiles.expand(layer.lists.mask(), (100, 70), (16, 16))
    weight, bias = layer.to_dense().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    x, target = normal(30, 70, seed=2), normal(30, 100, seed=3)
    ours, dense = optimizer(layer.parameters(), lr=0.1), optimizer([weight, bias], lr=0.1)
    for _ in range(5):
        losses = []
        outputs = layer(x), F.gelu(F.linear(x, weight * mask, bias))
        for y, step in zip(outputs, (ours, dense), strict=True):
            step.zero_grad()
            loss = F.mse_loss(y, target)
            loss.backward()
            step.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(layer.to_dense(), weight.detach() * mask)
    edge = layer.values.detach()[layer.lists.lines == 6, 100 - 6 * 16 :]
    assert edge.numel()
    assert not edge.any()  # what sticks out of W stays zero


@pytest.mark.parametrize("shape", [(70,), (0, 70), (3, 70), (2, 3, 70), (2, 0, 70)])
def test_any_leading_dimensions(shape):
    layer = made()
    x = normal(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 100)
    torch.testing.assert_close(y, F.linear(x, layer.to_dense(), layer.bias))
    layer = made(dtype=HALVES[0], kernel="triton")
    y = layer(x.to(HALVES[0]))
    assert y.shape == (*shape[:-1], 100)
    y.sum().backward()
    assert layer.values.grad.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_a_layer_returns_can_be_written(activation):
    for N in (96, 100):  # rows at 16 bytes, and not
        layer = made(N=N, dtype=HALVES[0], kernel="triton", activation=activation)
        x = normal(5, 70, dtype=HALVES[0])
        once = layer(x)
        if activation == "relu":  # its gradient is made of its output
            once = once.clone()
        once += x[:, :1]
        once.mul_(2).sum().backward()
        found = layer.values.grad.clone()
        layer.zero_grad()
        (2 * layer(x)).sum().backward()
        assert torch.equal(found, layer.values.grad)


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_the_activation_is_the_exact_one_and_a_write_over_what_its_backward_reads_is_refused(
    kernel,
):
    x = torch.linspace(-4, 4, 96, device=DEVICE, dtype=HALVES[0]).view(1, 3, 32)
    weight = torch.eye(32, device=DEVICE, dtype=HALVES[0])
    for name in ("relu", "gelu"):
        layer = BlockSparseLinear.from_dense(weight, block=16, activation=name, kernel=kernel)
        y = layer(x)
        true = ACTIVATIONS[name](x.double())
        torch.testing.assert_close(y.double(), true, rtol=HALF, atol=HALF / 8)
        if name == "relu":
            y.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_the_tiles_that_are_kept():
    weight = whole(64, 64, dtype=torch.float64)
    layer = BlockSparseLinear.from_dense(weight, block=16, sparsity=0.75)
    assert layer.lists.kept == 4
    means = tiles.magnitude(weight, (16, 16))
    assert means[layer.lists.mask()].min() >= means[~layer.lists.mask()].max()
    again = BlockSparseLinear.from_dense(layer.to_dense(), block=16)  # those that are not zero
    assert torch.equal(again.lists.mask(), layer.lists.mask())
    assert torch.equal(again.values, layer.values)
    assert "kept=4 of 16 tiles" in repr(layer)


def test_autocast_multiplies_in_its_dtype_and_trains_float32():
    layer = made(dtype=torch.float32, activation="relu")
    x = normal(6, 70, dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x)
        expected = F.relu(F.linear(x, layer.to_dense(), layer.bias))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    y.sum().backward()
    assert layer.values.grad.dtype == layer.bias.grad.dtype == torch.float32


def test_a_state_brings_its_own_tiles():
    layer = made(sparsity=0.8)
    other = made(sparsity=0.5)
    held = other.values
    other(normal(5, 70)).sum().backward()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.values is held
    assert torch.equal(other.to_dense(), layer.to_dense())
    x = normal(5, 70)
    assert torch.equal(other(x), layer(x))
    other(x).sum().backward()  # no gradient of the tiles before stands in its way
    twin = made(sparsity=0.5)
    twin.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(twin(x), layer(x))


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    layer, x = made(), normal(5, 70)
    before = layer(x)
    own = layer.state_dict()
    dense = {"weight": normal(100, 70), "bias": own["bias"]}
    states = {
        "missing": dense,
        "which entries it holds": {k: v for k, v in own.items() if k != "_extra_state"},
        "'block': 32": made(block=32).state_dict(),
        r"'shape': \[100, 64\]": made(K=64).state_dict(),
        "changed after it was saved": own | {"_extra_state": _one_tile_less(own)},
        "of a mask with": own | {"values": own["values"][1:]},
    }
    for message, state in states.items():
        with pytest.raises(RuntimeError, match=message if message != "missing" else "[Mm]issing"):
            layer.load_state_dict(state)
        layer.load_state_dict(own)
        assert torch.equal(layer(x), before)


def _one_tile_less(state):
    spoilt = state["_extra_state"].clone()
    spoilt[spoilt.nonzero()[-1]] = 0
    return spoilt


def test_averaging_spoils_no_index():
    layer = made()
    model = nn.Sequential(layer)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        with torch.no_grad():
            layer.values.mul_(0.5)
        average.update_parameters(model)
        with torch.no_grad():  # an average over states, as some recipes make it
            for kept, new in zip(
                average.module.state_dict().values(), model.state_dict().values(), strict=True
            ):
                kept.copy_(kept * 0.9 + 0.1 * new)
    twin = average.module[0]
    assert torch.equal(twin.lists.mask(), layer.lists.mask())
    twin.load_state_dict(twin.state_dict())
    torch.testing.assert_close(
        twin(normal(4, 70)), F.linear(normal(4, 70), twin.to_dense(), twin.bias)
    )


def test_copies_and_casts_have_lists_of_their_own():
    layer = made()
    twin = copy.deepcopy(layer)
    assert twin.lists.lines.data_ptr() != layer.lists.lines.data_ptr()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = normal(5, 70)
    assert torch.equal(layer(x), twin(x))
    assert torch.equal(layer(x), loaded(x))
    twin.to(HALVES[0])
    assert twin.lists.lines.dtype == torch.int32
    assert relative(twin(x.to(HALVES[0])), layer(x)) < 0.01


@pytest.mark.gpus(1)
def test_a_layer_moves_with_its_lists():
    layer = made().cpu()
    x = torch.randn(5, 70, dtype=torch.float64)
    there = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), there)


def test_a_layer_made_in_inference_mode_trains():
    with torch.inference_mode():
        layer = made(dtype=HALVES[0], kernel="triton")
    layer(normal(5, 70, dtype=HALVES[0])).sum().backward()
    assert layer.values.grad.isfinite().all()


@pytest.mark.parametrize(
    "activation",
    [
        "gelu",
        pytest.param("relu", marks=pytest.mark.slow),
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_a_compiler_sees_operators(activation):
    layer = made(dtype=HALVES[0], kernel="triton", activation=activation)
    x, dy = normal(5, 70, dtype=HALVES[0]), normal(5, 100, seed=1, dtype=HALVES[0])
    expected = results(layer, x, dy)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    own = x.detach().requires_grad_()
    layer.zero_grad()
    y = compiled(own)
    y.backward(dy)
    found = y.detach(), own.grad, layer.values.grad, layer.bias.grad
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_costs_count_kept_tiles():
    layer = made(N=128, K=128, block=32, sparsity=0.75)
    cost = layer.cost(10)
    assert cost.flops == 2 * 10 * 4 * 32 * 32
    assert cost.weight_bytes == 4 * 32 * 32 * 8 == layer.weight_bytes()[0]
    assert cost.activation_bytes == 10 * 256 * 8
    assert layer.paths(10) == {"forward": "plain PyTorch: dense product with the expanded weight"}


def test_what_cannot_be_is_refused_with_the_value_and_the_fix():
    weight = normal(64, 64)
    build = BlockSparseLinear.from_dense
    mask = torch.ones(4, 4, dtype=torch.bool, device=DEVICE)
    for match, options in {
        "block = 48: use one of 16": {"block": 48},
        "sparsity = 1.0": {"block": 16, "sparsity": 1.0},
        "leaves less than one tile": {"block": 64, "sparsity": 0.5},
        "and a mask": {"block": 16, "sparsity": 0.5, "mask": mask},
        r"bool \[4, 4\] is needed": {"block": 16, "mask": mask[:2]},
        "a mask of float32": {"block": 16, "mask": mask.float()},
        "none of the 16 tiles": {"block": 16, "mask": ~mask},
        "activation = 'tanh'": {"activation": "tanh"},
        "kernel = 'cuda'": {"kernel": "cuda"},
        "bf16 or fp16, got float64": {"kernel": "triton"},
    }.items():
        with pytest.raises(ValueError, match=match):
            build(weight, **options)
    spoilt = weight.clone()
    spoilt[3, 5] = torch.inf
    with pytest.raises(ValueError, match="row 3, column 5"):
        build(spoilt, sparsity=0)
    layer = build(weight, block=16)
    with pytest.raises(ValueError, match="63 features, the layer takes 64"):
        layer(weight[:, :63])
    with pytest.raises(ValueError, match="convert one of them"):
        layer(weight.float())
