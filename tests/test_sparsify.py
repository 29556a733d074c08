"""`sparsify` puts sparse layers in place of pruned ones, and says what it left and why."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blockshock.block_sparse import (
    BlockSparseLinear,
    Settings,
    apply_supermask,
    fold,
    sparsify,
    tiles,
)
from blockshock.block_sparse.semi_structured import SemiStructured
from tests.block_sparse_checks import DEVICE, HALVES

DTYPE = HALVES[0] if DEVICE == "cuda" else torch.float64
NEAR = {"rtol": 0.02, "atol": 0.02} if DEVICE == "cuda" else {}


class Net(nn.Module):
    """Two pruned layers, one that is whole, a shared pair, a subclass."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 10)
        self.tied = nn.Linear(64, 64)
        self.again = self.tied

    def forward(self, x):
        return self.head(self.again(self.tied(self.down(F.gelu(self.up(x))))))


def net(prune=("up", "down", "tied")):
    torch.manual_seed(0)
    model = Net().to(DEVICE, DTYPE)
    for name in prune:
        weight = getattr(model, name).weight
        kept = tiles.keep_top(tiles.magnitude(weight, (32, 32)), 0.5)
        weight.data.copy_(tiles.masked(weight.data, kept, (32, 32)))
    return model


def test_pruned_layers_are_replaced_and_the_model_computes_what_it_did():
    model = net()
    x = torch.randn(5, 64, device=DEVICE, dtype=DTYPE)
    before = model(x)
    model.up.weight.requires_grad_(False)
    model.up.weight.no_decay, model.down.name = True, "b"
    old = model.down.weight
    report = sparsify(model.eval(), block=32)
    assert not model.up.training
    assert report.replaced == ["up", "down"]
    assert "is shared" in report.left["tied"]
    assert report.left["head"] == (
        "none of its 2 tiles of 32 x 32 is zero; prune it, or give sparsity="
    )
    assert "2 layers are now bsr" in str(report)
    assert type(model.up) is BlockSparseLinear
    assert model.up.lists.kept == 4
    assert not model.up.values.requires_grad
    assert model.up.values.no_decay
    assert model.down.name == "b"
    assert report.parameters[old] is model.down.values
    torch.testing.assert_close(model(x), before, **NEAR)
    model(x).sum().backward()
    assert model.up.values.grad is None
    assert model.down.values.grad is not None
    with pytest.warns(UserWarning, match="changed nothing"):
        again = sparsify(model, block=32)
    assert again.left["up"] == "it is bsr already"


def test_two_of_four_of_what_is_left():
    model = net()
    kept = tiles.tile_sums(model.up.weight.detach() != 0, (32, 32)) > 0
    report = sparsify(model, "*", storage="semi_structured", block=32)
    assert report.replaced == ["up", "down"]
    assert type(model.up) is SemiStructured
    groups = model.up.to_dense().unflatten(1, (-1, 4))
    assert ((groups != 0).sum(-1) <= 2).all()
    assert torch.equal(tiles.tile_sums(model.up.to_dense() != 0, (32, 32)) > 0, kept)


def test_a_sparsity_prunes_what_is_asked_for():
    model = net(prune=())
    report = sparsify(model, lambda name, layer: name != "up", block=16, sparsity=0.75)
    assert report.replaced == ["down", "head"]
    assert report.left["up"] == "not asked for by `where`"
    assert model.down.lists.kept == 8
    assert model.head.to_dense().shape == (10, 64)


def chain(*activations):
    torch.manual_seed(0)
    made, shared = [], nn.ReLU()
    for activation in activations:
        made += [nn.Linear(64, 64), shared if activation == "shared" else activation]
    return nn.Sequential(*made).to(DEVICE, DTYPE)


def test_an_activation_that_follows_a_layer_is_fused_where_that_is_asked():
    odd = nn.ReLU()
    odd.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "chain": chain(nn.GELU(), nn.ReLU(), nn.GELU("tanh"), "shared", "shared", odd),
            "mine": type("Mine", (nn.Sequential,), {})(nn.Linear(64, 64), nn.ReLU()),
        }
    ).to(DEVICE, DTYPE)
    x = torch.randn(5, 64, device=DEVICE, dtype=DTYPE)
    plain = copy.deepcopy(model)
    sparsify(plain, block=16, sparsity=0.5)
    sparsify(model, block=16, sparsity=0.5, fuse=True)
    for name in ("chain", "mine"):
        torch.testing.assert_close(model[name](x), plain[name](x), **NEAR)
    layers = [m for m in model.modules() if isinstance(m, BlockSparseLinear)]
    assert [layer.activation for layer in layers] == ["gelu", "relu", *[None] * 5]
    assert [type(m) is nn.Identity for m in model["chain"]] == [
        False,
        True,
        False,
        True,
        *[False] * 8,
    ]
    assert all(m.activation is None for m in plain.modules() if isinstance(m, BlockSparseLinear))


def test_an_activation_is_fused_into_no_layer_but_the_one_before_it():
    twice = nn.ReLU()
    model = nn.Sequential(nn.Linear(64, 64), twice, nn.Linear(64, 64), twice, nn.GELU())
    model.to(DEVICE, DTYPE)
    sparsify(model, block=16, sparsity=0.5, fuse=True)
    assert [model[0].activation, model[2].activation] == [None, None]
    assert type(model[4]) is nn.GELU


def test_an_activation_behind_a_layer_that_is_left_stays():
    model = chain(nn.GELU(), nn.ReLU())
    sparsify(model, "2", block=16, sparsity=0.5, fuse=True)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, BlockSparseLinear, nn.Identity]


def test_a_layer_under_a_supermask_is_left_until_it_is_folded():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(DEVICE, DTYPE)
    apply_supermask(model, linear=Settings(block=32, sparsity=0.5), skip=("1",))
    report = sparsify(model, "1", block=32, sparsity=0.5)
    assert report.left["0"] == "it has a supermask; fold the model first"
    fold(model)
    assert sparsify(model, block=32).replaced == ["0"]


def test_optimizers_that_hold_a_replaced_weight_are_a_warning():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="SGD holds parameters that sparsify has replaced"):
        report = sparsify(model, "up", block=32)
    for group in optimizer.param_groups:
        group["params"] = [report.parameters.get(p, p) for p in group["params"]]
    before = model.up.values.detach().clone()
    model(torch.ones(1, 64, device=DEVICE, dtype=DTYPE)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.up.values, before)


def test_layers_in_pytorchs_encoders_are_called():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, device=DEVICE, dtype=DTYPE)
    model = nn.TransformerEncoder(layer, 2).eval()
    for part in model.layers:
        part.linear1.weight.data[:64] = 0
    x = torch.randn(2, 5, 64, device=DEVICE, dtype=DTYPE)
    with torch.no_grad():
        expected = model(x)
    report = sparsify(model)
    assert report.replaced == ["layers.0.linear1", "layers.1.linear1"]
    assert "subclass" in report.left["layers.0.self_attn.out_proj"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **NEAR)


def test_what_cannot_be_is_refused_and_changes_nothing():
    model = net()
    before = model.state_dict()
    for match, options in {
        "unknown storage 'csr'; use one of bsr, semi_structured": {"storage": "csr"},
        "where = 3 is neither a text nor a function": {"where": 3},
        "kernel = 'cuda'": {"kernel": "cuda"},
        "kernel = 'torch'": {"kernel": "torch", "storage": "semi_structured"},
        "block = 8": {"block": 8},
        "sparsity = 1": {"sparsity": 1},
        "fuse = True with storage 'semi_structured': only bsr": {
            "fuse": True,
            "storage": "semi_structured",
        },
    }.items():
        with pytest.raises(ValueError, match=match):
            sparsify(model, **options)
    model.down.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'down': .*row 3, column 4"):
        sparsify(model, block=32)
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match="is itself one layer"):
        sparsify(model.up)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = sparsify(net(), storage="semi_structured", sparsity=0.0).left
    assert "N = 10" in left["head"]
