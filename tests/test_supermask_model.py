"""A model under supermasks computes what its masked layers say, and folds into an ordinary one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import blockshock
from blockshock.block_sparse.model import apply_supermask, fold, set_sparsity, supermasks
from blockshock.block_sparse.schedule import cubic
from blockshock.block_sparse.supermask import Settings, SupermaskConv2d, SupermaskLinear
from blockshock.data_parallel import METHODS

HALF = Settings(block=4, sparsity=0.5)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """A patch convolution, a 1 × 1 one, blocks, a head."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.wider = nn.Conv2d(8, 16, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        x = self.wider(self.patches(images)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Tied(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.weight = layer.weight


def made():
    torch.manual_seed(0)
    return Model()


def images(B=3):
    return torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(1))


MLPS = [f"blocks.{i}.mlp.{j}" for i in range(3) for j in (0, 2)]


def test_each_kind_of_layer_has_its_own_settings():
    model = made()
    small = Settings(block=(4, 1), sparsity=0.5, gradient="through")
    report = apply_supermask(model, linear=HALF, conv=small)
    assert report.replaced == ["patches", *MLPS, "head"]
    assert report.left == {"wider": "no settings for conv1x1 layers"}
    assert type(model.patches) is SupermaskConv2d
    assert model.patches.gradient == "through"
    assert type(model.head) is SupermaskLinear
    assert model.head.sparsity == 0.5
    assert "8 layers are now supermask" in str(report)
    assert "wider: no settings for conv1x1 layers" in str(report)


def test_what_is_skipped_is_left_with_the_reason():
    model = made()
    skip = ("first_block", "last_layer", "blocks.1.mlp.0")
    report = apply_supermask(model, linear=HALF, skip=skip)
    assert report.replaced == ["blocks.1.mlp.2", "blocks.2.mlp.0", "blocks.2.mlp.2"]
    assert report.left["blocks.0.mlp.2"] == "skipped by 'first_block'"
    assert report.left["head"] == "skipped by 'last_layer'"
    assert report.left["blocks.1.mlp.0"] == "skipped by 'blocks.1.mlp.0'"


def test_the_first_block_is_found_in_a_sequential_of_its_own():
    model = nn.Sequential(Block(), Block(), Block())
    assert apply_supermask(model, linear=HALF, skip=("first_block",)).replaced == [
        "1.mlp.0", "1.mlp.2", "2.mlp.0", "2.mlp.2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "call", "message"),
    [
        (made, {}, "no settings; give linear="),
        (made, {"linear": HALF, "skip": ("blocks.9.*",)}, r"skip = 'blocks\.9\.\*' fits no"),
        (made, {"linear": HALF, "skip": "head"}, r"give \('head',\)"),
        (lambda: nn.Linear(8, 8), {"linear": HALF}, "SupermaskLinear.from_dense"),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
            {"linear": HALF, "skip": ("first_block",)},
            "no nn.ModuleList or nn.Sequential of blocks",
        ),
    ],
)
def test_a_call_that_cannot_be_is_refused_and_changes_nothing(build, call, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        apply_supermask(model, **call)
    assert not list(supermasks(model))


def test_a_layer_that_cannot_be_covered_is_left_with_the_reason():
    model = nn.ModuleDict({
        "small": nn.Linear(4, 4),
        "computed": nn.utils.spectral_norm(nn.Linear(8, 8)),
        "meta": nn.Linear(8, 8, device="meta"),
        "embedding": nn.Embedding(8, 8),
        "tied": nn.Linear(8, 8),
        "patched": nn.Linear(8, 8),
        "attention": nn.MultiheadAttention(8, 2),
    })  # fmt: skip
    model["tied"].weight = model["embedding"].weight
    model["patched"].forward = lambda x: x
    with pytest.warns(UserWarning, match="apply_supermask changed nothing"):
        report = apply_supermask(model, linear=HALF)
    assert report.replaced == []
    expected = {
        "small": "less than one tile",
        "computed": "its weight is computed",
        "meta": "without values",
        "tied": "shared with another module",
        "patched": "'forward' was replaced",
        "attention.out_proj": "a subclass (NonDynamicallyQuantizableLinear)",
    }
    assert report.left.keys() == expected.keys()
    assert all(text in report.left[name] for name, text in expected.items())
    apply_supermask(made_model := made(), linear=HALF)
    with pytest.warns(UserWarning, match="apply_supermask changed nothing"):
        again = apply_supermask(made_model, linear=HALF)
    assert again.left["head"] == "it has a supermask already; fold it first"


def test_folding_gives_ordinary_layers_with_the_same_outputs_and_parameters():
    model = made()
    types, names = [type(m) for m in model.modules()], list(model.state_dict())
    parameters, repr_before = list(model.parameters()), repr(model)
    apply_supermask(model, linear=HALF, conv=Settings(block=(4, 1), sparsity=0.5))
    before = model(images())
    assert fold(model) == ["patches", *MLPS, "head"]
    assert torch.equal(model(images()), before)
    assert [type(m) for m in model.modules()] == types
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert repr(model) == repr_before
    zeros = (model.blocks[0].mlp[0].weight.detach().view(8, 4, 4, 4) == 0).all(3).all(1)
    assert int(zeros.sum()) == 16
    assert fold(model) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: prune.l1_unstructured(model.head, "weight", 0.1), "'head' is computed"),
        (lambda model: parametrizations.weight_norm(model.head), "'head' is computed"),
        (lambda model: setattr(model, "table", Tied(model.head)), "'head' is shared"),
    ],
)
def test_a_weight_that_a_mask_cannot_be_written_into_is_not_folded(change, message):
    model = made()
    apply_supermask(model, linear=HALF)
    change(model)
    before = model(images())
    with pytest.raises(ValueError, match=message):
        fold(model)
    assert torch.equal(model(images()), before)
    assert type(model.blocks[0].mlp[0]) is SupermaskLinear


def test_an_optimizer_made_before_goes_on_after_covering_and_folding():
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="SGD was made before apply_supermask"):
        apply_supermask(model, linear=HALF)
    optimizer.add_param_group({"params": [layer.scores for _, layer in supermasks(model)]})
    before = copy.deepcopy(model.state_dict())
    model(images()).square().sum().backward()
    optimizer.step()
    for name in ("head.weight", "head.scores"):
        assert not torch.equal(model.state_dict()[name], before[name])
    fold(model)
    optimizer.zero_grad()
    model(images()).square().sum().backward()
    weight = model.head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.head.weight, weight)


def test_the_encoders_of_pytorch_call_their_covered_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    apply_supermask(model, linear=HALF)
    trained = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained)
        fold(model)
        torch.testing.assert_close(model(x), trained)
    assert model.use_nested_tensor
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_wrapper_made_before_is_a_warning_and_fixed_masks_are_none():
    model = made()
    wrapper = METHODS["none"](model)
    fixed = Settings(block=4, sparsity=0.5, fixed_mask=True)
    assert len(apply_supermask(wrapper.module, linear=fixed).replaced) == 7
    fold(model)
    with pytest.warns(UserWarning, match="NoSync was made before apply_supermask"):
        apply_supermask(wrapper.module, linear=HALF)


def test_folding_leaves_the_encoders_of_other_converted_layers_alone():
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    blockshock.convert(model, "dense_single", where="*.linear1")
    apply_supermask(model, linear=HALF)
    fold(model)
    converted, folded = model.layers[0].linear1, model.layers[0].linear2
    assert (len(converted._forward_pre_hooks), len(folded._forward_pre_hooks)) == (1, 0)
    assert not model.use_nested_tensor
    blockshock.revert(model)
    assert model.use_nested_tensor


def test_a_covered_model_is_compiled_whole():
    torch._dynamo.reset()
    model = made()
    apply_supermask(model, linear=HALF, conv=Settings(block=(4, 1), sparsity=0.5))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for sparsity in (0.5, 0.0):
        set_sparsity(model, sparsity)
        torch.testing.assert_close(compiled(images()), model(images()))


def test_convert_leaves_covered_layers_to_their_masks():
    model = made()
    apply_supermask(model, linear=HALF)
    with pytest.warns(UserWarning, match="changed nothing"):
        report = blockshock.convert(model, "dense_single")
    assert "a subclass of nn.Linear (SupermaskLinear)" in report.left["head"]


def test_sparsity_is_set_for_every_layer_of_a_model():
    model = made()
    apply_supermask(model, linear=HALF)
    set_sparsity(model, 0.75)
    assert {layer.sparsity for _, layer in supermasks(model)} == {0.75}
    with pytest.raises(ValueError, match=r"layer 'head': sparsity = 0\.95 of 12 tiles"):
        set_sparsity(model, 0.95)  # the layers before the head have 32
    assert {layer.sparsity for _, layer in supermasks(model)} == {0.75}


def test_the_cubic_schedule_is_that_of_its_equation():
    at = [cubic(step, begin=10, end=20, final=0.8, initial=0.2) for step in range(25)]
    assert at[:11] == [0.2] * 11
    assert at[20:] == [0.8] * 5
    assert at[15] == pytest.approx(0.8 - 0.6 / 8)
    assert at[10:21] == sorted(at[10:21])
    assert at[11] - at[10] > 10 * (at[20] - at[19])
    assert [cubic(step, begin=3, end=3, final=0.5) for step in (2, 3, 4)] == [0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"end": 5}, "end = 5 is before begin = 10"),
        ({"final": 1.0}, "sparsity = 1.0"),
        ({"initial": -0.5}, "sparsity = -0.5"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        cubic(0, **{"begin": 10, "end": 20, "final": 0.8, **changed})
