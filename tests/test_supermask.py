"""A supermask layer computes the masked dense layer, and its gradients are those of the algebra."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from blockshock.block_sparse.supermask import (
    GRADIENTS,
    Settings,
    SupermaskConv2d,
    SupermaskLinear,
    cover,
)

quick = settings(max_examples=40, deadline=None)


def whole(*shape, seed=0):
    """Small whole numbers in float64: products and sums are exact, so results are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).double()


def filled(layer, seed=0):
    """The layer in float64 with whole numbers as weights, and other scores than their size."""
    layer = layer.double()
    with torch.no_grad():
        for place, parameter in enumerate(layer.parameters()):
            parameter.copy_(whole(*parameter.shape, seed=seed + place))
    return layer


def kept_elements(layer):
    """The mask of W [N, K...] by definition: the largest scores, the first of equal ones."""
    scores, weight = layer.scores.detach(), layer.weight
    columns, (b0, b1) = scores.shape[1], layer.block
    order = sorted(range(scores.numel()), key=lambda t: (-scores.flatten()[t].item(), t))
    stays = order[: round((1 - layer.sparsity) * scores.numel())]
    keep = torch.zeros(weight.shape, dtype=weight.dtype)
    for t in stays:
        r, c = divmod(t, columns)
        keep[r * b0 : (r + 1) * b0, c * b1 : (c + 1) * b1] = 1
    return keep


def assert_gradients(layer, d_masked, keep):
    """Of weight and scores, from dWm, tile by tile."""
    through = layer.gradient == "through"
    assert torch.equal(layer.weight.grad, d_masked if through else d_masked * keep)
    product, (b0, b1) = d_masked * layer.weight.detach(), layer.block
    for r, row in enumerate(layer.scores.grad):
        for c, found in enumerate(row):
            tile = product[r * b0 : (r + 1) * b0, c * b1 : (c + 1) * b1]
            assert found == tile.sum(), (r, c)


@quick
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    block=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.8]),
    gradient=st.sampled_from(GRADIENTS),
    bias=st.booleans(),
    rows=st.sampled_from([(), (1,), (0,), (5,), (2, 3)]),
)
def test_a_linear_layer_is_the_masked_dense_one(shape, block, sparsity, gradient, bias, rows):
    N, K = shape
    options = {"block": block, "sparsity": sparsity, "gradient": gradient}
    tile_count = -(-N // block[0]) * -(-K // block[1])
    assume((1 - sparsity) * tile_count >= 1)
    layer = filled(SupermaskLinear(K, N, bias, **options))
    x = whole(*rows, K, seed=7).requires_grad_()
    dy = whole(*rows, N, seed=8)
    y = layer(x)
    y.backward(dy)
    keep = kept_elements(layer)
    masked = layer.weight.detach() * keep
    added = layer.bias.detach() if bias else 0
    flat_x, flat_dy = x.detach().reshape(-1, K), dy.reshape(-1, N)
    assert torch.equal(y.detach(), x.detach() @ masked.T + added)
    assert torch.equal(x.grad, dy @ masked)
    assert_gradients(layer, flat_dy.T @ flat_x, keep)
    if bias:
        assert torch.equal(layer.bias.grad, flat_dy.sum(0))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    ("sizes", "options", "block"),
    [
        ((8, 12, 1), {}, (4, 3)),
        ((7, 10, 3), {"padding": 1, "stride": 2}, (4, 3)),
        ((6, 8, (3, 2)), {"groups": 2, "bias": False, "dilation": 2}, (2, 2)),
        ((6, 8, 3), {"padding": 1, "padding_mode": "circular"}, (5, 5)),
    ],
    ids=["1x1", "ragged", "groups", "circular"],
)
def test_a_convolution_is_the_masked_dense_one(sizes, options, block, gradient):
    masking = {"block": block, "sparsity": 0.5, "gradient": gradient}
    layer = filled(SupermaskConv2d(*sizes, **options, **masking))
    x = whole(2, sizes[0], 9, 8, seed=7).requires_grad_()
    y = layer(x)
    dy = whole(*y.shape, seed=8)
    y.backward(dy)
    keep = kept_elements(layer)
    dense = nn.Conv2d(*sizes, **options).double()
    with torch.no_grad():
        dense.weight.copy_(layer.weight * keep)
        if dense.bias is not None:
            dense.bias.copy_(layer.bias)
    same_x = x.detach().requires_grad_()
    same_y = dense(same_x)
    same_y.backward(dy)
    assert torch.equal(y, same_y)
    assert torch.equal(x.grad, same_x.grad)
    assert_gradients(layer, dense.weight.grad, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scores_gradient_is_as_exact_as_the_weights(dtype):
    torch.manual_seed(0)
    layer = SupermaskLinear(256, 192, block=32, sparsity=0.5, gradient="through").to(dtype)
    x, dy = torch.randn(512, 256), torch.randn(512, 192)
    layer(x.to(dtype)).backward(dy.to(dtype))
    d_masked = dy.to(dtype).double().T @ x.to(dtype).double()
    product = (d_masked * layer.weight.detach().double()).view(6, 32, 8, 32).sum((1, 3))
    errors = [
        float((found.double() - true).norm() / true.norm())
        for found, true in ((layer.weight.grad, d_masked), (layer.scores.grad, product))
    ]
    assert errors[1] <= 1.5 * errors[0]
    assert errors[0] > 0


def test_second_derivatives_are_those_of_the_algebra():
    layer, dy = filled(SupermaskLinear(6, 4, block=2, sparsity=0.5)), whole(3, 4, seed=8)
    x, keep = whole(3, 6, seed=9).requires_grad_(), kept_elements(layer)
    weight = layer.weight.detach().requires_grad_()

    def second(first, parameters):
        total = sum((gradient * whole(*gradient.shape, seed=3)).sum() for gradient in first)
        return torch.autograd.grad(total, parameters)

    loss = (layer(x) ** 2 * dy).sum()
    first = torch.autograd.grad(loss, (layer.weight, layer.scores), create_graph=True)
    y = x @ (weight * keep).T + layer.bias.detach()
    d_masked = (2 * y * dy).T @ x
    sums = (d_masked * weight).view(2, 2, 3, 2).sum((1, 3))
    true = second((d_masked * keep, sums), (x, weight))
    found = second(first, (x, layer.weight))
    assert torch.equal(found[0], true[0])
    assert torch.equal(found[1], true[1])


def test_options_fix_the_mask_and_the_weight():
    layer = SupermaskLinear(16, 16, block=4, sparsity=0.5, fixed_mask=True, fixed_weight=True)
    layer(torch.ones(1, 16)).sum().backward()
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"bias"}
    assert layer.scores.grad is None
    before = layer.mask
    layer.sparsity = 0.75  # a schedule drops further tiles of a fixed order
    assert int(layer.mask.sum()) == 4
    assert not (layer.mask & ~before).any()


def test_scores_begin_with_the_size_of_each_tile():
    dense = nn.Linear(10, 9)
    layer = SupermaskLinear.from_dense(dense, block=4, sparsity=0.5)
    means = [dense.weight[r : r + 4, c : c + 4].abs().mean() for r in (0, 4, 8) for c in (0, 4, 8)]
    means = torch.stack(means).view(3, 3)
    torch.testing.assert_close(layer.scores.detach(), (means / means.mean()).detach())
    with torch.no_grad():
        layer.weight[:4, :4] = 9.0
    layer.reset_scores()
    assert layer.scores.argmax() == 0
    with torch.no_grad():
        layer.weight.zero_()
    layer.reset_scores()
    assert torch.equal(layer.scores, torch.zeros(3, 3))


def test_from_dense_copies_and_cover_keeps_the_object():
    dense = nn.Linear(8, 8)
    copied = SupermaskLinear.from_dense(dense, block=4, sparsity=0.5)
    assert type(dense) is nn.Linear
    assert torch.equal(copied.weight, dense.weight)
    assert copied.weight is not dense.weight
    weight, seen = dense.weight, []
    dense.register_forward_hook(lambda *_: seen.append("called"))
    same = cover(dense, Settings(block=4, sparsity=0.5))
    assert same is dense
    assert same.weight is weight
    x = torch.randn(3, 8)
    before = same(x)
    folded = same.fold()
    assert folded is dense
    assert type(folded) is nn.Linear
    assert folded.weight is weight
    assert list(folded.state_dict()) == ["weight", "bias"]
    assert torch.equal(folded(x), before)
    assert seen == ["called"] * 2
    assert repr(folded) == repr(nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SupermaskLinear(8, 8, block=4, sparsity=1.0), "sparsity = 1.0"),
        (lambda: SupermaskLinear(8, 8, block=0, sparsity=0.5), "block = 0"),
        (lambda: SupermaskLinear(8, 8, block=8, sparsity=0.5), "less than one tile.*smaller"),
        (
            lambda: SupermaskConv2d(8, 8, 3, block=(8, 4), sparsity=0.8),
            r"block = \(8, 4\) in a weight \[8, 8\]",
        ),
        (
            lambda: SupermaskLinear(8, 8, block=4, sparsity=0.5, gradient="none"),
            "gradient = 'none': use one of masked, through",
        ),
        (
            lambda: SupermaskLinear.from_dense(nn.Conv2d(4, 4, 1), block=2, sparsity=0.5),
            "made from an nn.Linear, not a Conv2d",
        ),
        (
            lambda: SupermaskConv2d.from_dense(nn.Linear(4, 4), block=2, sparsity=0.5),
            "made from an nn.Conv2d, not a Linear",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_value_and_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_sparsity_that_leaves_nothing_is_refused_and_changes_nothing():
    layer = SupermaskLinear(8, 8, block=4, sparsity=0.5)
    for value in (0.9, 1.0, -0.1):
        with pytest.raises(ValueError, match="sparsity = "):
            layer.sparsity = value
    assert layer.sparsity == 0.5
