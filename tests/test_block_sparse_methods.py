"""Every block-sparse method computes the masked dense layer; 2:4 computes what it holds."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from blockshock.block_sparse import METHODS, tiles
from blockshock.block_sparse.semi_structured import SemiStructured
from tests.block_sparse_checks import ACTIVATIONS, DEVICE, HALVES, relative, truth

# On the CPU PyTorch's BSR takes no halves; on a GPU 2:4 and kernels take nothing else.
DTYPE = HALVES[0] if DEVICE == "cuda" else torch.float64
OTHER = HALVES[-1] if DEVICE == "cuda" else torch.float32  # to cast to
NEAR = 0.01 if DEVICE == "cuda" else 1e-12
# PyTorch says once a process that its sparse tensors are new.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse (BSR|CSR) tensor support is in beta")


def problem(N=128, K=192, B=40):
    generator = torch.Generator().manual_seed(0)
    sizes = (N, K), (N,), (B, K), (B, N)
    drawn = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return [t.to(DEVICE, DTYPE) for t in drawn]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_output_and_gradients_are_those_of_the_weight_that_is_held(name, activation):
    weight, bias, x, dy = problem()
    layer = METHODS[name].from_dense(weight, bias, block=32, sparsity=0.5, activation=activation)
    assert layer.method == name
    kept = tiles.keep_top(tiles.magnitude(weight, (32, 32)), 0.5)
    held = layer.to_dense()
    if name == "semi_structured":
        _check_24(held, weight * tiles.expand(kept, weight.shape, (32, 32)))
    else:
        assert torch.equal(held, weight * tiles.expand(kept, weight.shape, (32, 32)))
    everything = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    y, dx, dw, db = truth(held, bias, everything, 192, x, dy, activation)
    own = x.clone().requires_grad_()
    out = layer(own.view(2, -1, 192))
    out.backward(dy.view_as(out))
    assert relative(out.view_as(y), y) < NEAR
    assert relative(own.grad, dx) < NEAR
    assert relative(layer.bias.grad, db) < NEAR
    for parameter, expected in layer.restrict(dw).items():
        found = getattr(layer, parameter).grad
        if name == "dense":
            expected = dw
        assert relative(found, expected) < NEAR
    cost = layer.cost(40)
    assert 0 < cost.flops <= 2 * 40 * weight.numel()
    assert cost.activation_bytes == 40 * (128 + 192) * weight.element_size()


def _check_24(held, pruned):
    """Of every four entries the two largest are held."""
    groups, of_pruned = held.unflatten(1, (-1, 4)), pruned.unflatten(1, (-1, 4))
    assert ((groups != 0).sum(-1) <= 2).all()
    largest = of_pruned.abs().topk(2, dim=-1).values.sum(-1)
    assert torch.equal(groups.abs().sum(-1), largest)
    assert torch.equal(groups[groups != 0], of_pruned[groups != 0])


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_cannot_hold_is_refused_with_the_value_and_the_fix(name):
    weight = problem()[0]
    build = METHODS[name].from_dense
    for match, options in {
        "block = 40": {"block": 40},
        "sparsity = -1": {"sparsity": -1},
        "activation = 'silu'": {"activation": "silu"},
    }.items():
        with pytest.raises(ValueError, match=match):
            build(weight, **options)
    bias = weight.new_zeros(128)
    for match, operands in {
        r"\[1, 128, 192\].*\[N, K\] is needed": (weight[None], None),
        "int64": (weight.long(), None),
        "on meta": (weight.to("meta"), None),
        r"the bias is \w+ \[127\].*needs \w+ \[128\]": (weight, bias[1:]),
        r"the bias is \w+ \[1, 128\]": (weight, bias[None]),
        r"the bias is float32.*needs": (weight, bias.float()),
        "the bias is a list": (weight, [0.0] * 128),
        "the weight is a list": ([[0.0]], None),
        "sparse_coo": (weight.to_sparse(), None),
    }.items():
        with pytest.raises(ValueError, match=match):
            build(*operands, block=32)
    with pytest.raises(ValueError, match="the mask is a list"):
        build(weight, block=32, mask=[[True] * 6] * 4)
    ragged = weight[:100, :90]
    if name in ("torch_bsr", "semi_structured"):
        with pytest.raises(ValueError, match=r"N = 100.*multiple.*pad"):
            build(ragged, block=32)
    else:
        assert build(ragged, block=32)(problem()[2][:, :90]).shape == (40, 100)


@pytest.mark.parametrize("name", METHODS)
def test_a_deep_copy_computes_the_same_in_memory_of_its_own(name):
    weight, bias, x, _ = problem()
    layer = METHODS[name].from_dense(weight, bias, block=32, sparsity=0.5)
    model = torch.nn.ModuleList([layer, layer])
    expected, held = layer(x), layer.to_dense()
    twin, again = copy.deepcopy(model)
    assert again is twin
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), expected)
    own = list(twin.parameters())
    if name == "torch_bsr":
        own += [twin.weight.values(), twin.weight_t.values()]
    with torch.no_grad():
        for values in own:
            values.zero_()
    assert not twin(x).any()
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.to_dense(), held)


@pytest.mark.parametrize("name", ["bsr", "semi_structured"])
def test_a_layer_on_the_meta_device_knows_its_tiles_and_is_given_memory_or_tensors(name):
    weight, bias, x, _ = problem()
    layer = METHODS[name].from_dense(weight, bias, block=32, sparsity=0.5)
    for assign in (True, False):
        twin = copy.deepcopy(layer).to("meta")
        assert twin(x.to("meta")).shape == (40, 128)
        assert twin.state_dict().keys() == layer.state_dict().keys()
        if not assign:
            twin.to_empty(device=DEVICE)
        twin.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(twin.to_dense(), layer.to_dense())


def semi(**options):
    weight, bias, *_ = problem()
    return SemiStructured.from_dense(weight, bias, **{"block": 32, "sparsity": 0.5} | options)


def test_the_2_to_4_form_follows_its_parameter():
    layer, x = semi(), problem()[2]
    step = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    before = layer.to_dense()
    step.step()
    assert not torch.equal(layer.to_dense(), before)
    for twin in (copy.deepcopy(layer), copy.deepcopy(layer).to(OTHER).to(DTYPE), _loaded(layer)):
        torch.optim.SGD(twin.parameters(), lr=0.1).zero_grad()
        with torch.no_grad():
            twin.values.mul_(2)
        exact = F.linear(x.double(), twin.to_dense().double(), twin.bias.double())
        assert relative(twin(x), exact) < NEAR
        assert relative(twin.to_dense(), 2 * layer.to_dense()) < max(NEAR, 1e-6)  # of OTHER
        assert twin.values.data_ptr() == twin.packed.values.data_ptr()  # nothing is copied again


def test_the_2_to_4_form_follows_memory_that_others_give_its_parameter():
    layer, x = semi(), problem()[2]
    gathered = layer.values.detach().clone()
    layer.values.data = gathered  # as FSDP does, which writes what it gathers next there
    for _ in range(2):
        exact = F.linear(x.double(), layer.to_dense().double(), layer.bias.double())
        assert relative(layer(x), exact) < NEAR
        assert torch.equal(layer.packed.values, gathered)
        gathered.mul_(2)
    assert layer.values.data_ptr() == gathered.data_ptr()


@pytest.mark.parametrize("name", ["bsr", "semi_structured"])
def test_inside_autocast_a_layer_trains_and_returns_no_view(name):
    dtype = DTYPE if DEVICE == "cuda" else torch.float32  # autocast leaves float64 alone
    weight, bias, x, _ = (t.to(dtype) for t in problem())
    layer = METHODS[name].from_dense(weight, bias, block=32, sparsity=0.5)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x.view(2, -1, 192))
    assert not y._is_view()
    y.sum().backward()
    assert layer.values.grad.dtype == layer.values.dtype
    assert relative(layer.bias.grad, torch.full_like(bias, 40)) < 0.01


def _loaded(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = semi(sparsity=0.2)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


def test_a_state_of_another_2_to_4_form_is_refused():
    layer = semi()
    own = layer.state_dict()
    with pytest.raises(RuntimeError, match="which entries it holds"):
        layer.load_state_dict({k: v for k, v in own.items() if k != "_extra_state"})
    spoilt = own["_extra_state"].clone()
    spoilt[-1] = 21 - spoilt[-1]
    with pytest.raises(RuntimeError, match="changed after it was saved"):
        layer.load_state_dict(own | {"_extra_state": spoilt})


def test_a_second_derivative_of_the_2_to_4_form_is_refused():
    x = problem()[2].requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(semi()(x).sum(), x, create_graph=True)


def test_a_compiled_2_to_4_form_is_one_operator_with_the_same_output_and_no_backward():
    layer, x = semi(), problem()[2]
    whole = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        y = whole(x)
        assert relative(y, layer(x)) < NEAR  # a layer that is not compiled may take another kernel
        assert torch.equal(y, layer.packed.product(x, layer.bias))  # by cuSPARSELt on a GPU
    with pytest.raises(RuntimeError, match=r"no backward; train it without torch\.compile"):
        whole(x).sum().backward()


def test_a_2_to_4_form_that_was_cast_is_compiled_with_the_values_of_the_cast():
    layer, x = semi().to(OTHER), problem()[2].to(OTHER)
    exact = F.linear(x.double(), layer.to_dense().double(), layer.bias.double())
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert y.dtype == OTHER
    assert relative(y, exact) < max(NEAR, 1e-6)


@pytest.mark.gpus(1)
def test_values_in_memory_that_others_gave_are_refused_by_a_compiled_call():
    layer, x = semi(), problem()[2]
    layer.values.data = layer.values.detach().clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="not in the memory of its packed form"):
        torch.compile(layer, fullgraph=True, backend="eager")(x)
