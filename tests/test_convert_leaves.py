"""What else is on a layer: `convert` carries it over, or leaves the layer and says why."""

import copy
import enum
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import blockshock
from blockshock.linear import METHODS


def net(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64, **options), nn.Linear(64, 64, **options))


def convert(model, where="0"):
    """The report of a conversion that may change nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="convert changed nothing")
        return blockshock.convert(model, "dense_single", where=where)


def nothing(*args):
    return None


def patched(layer):
    before = layer.forward
    layer.forward = lambda x: before(x) + 1


ACTING = {
    "forward hook": lambda layer: layer.register_forward_hook(nothing),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(nothing),
    "forward hook with keywords": lambda layer: layer.register_forward_hook(
        lambda *_: None, with_kwargs=True
    ),
    "backward hook": lambda layer: layer.register_full_backward_hook(nothing),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(nothing),
    "state_dict pre-hook": lambda layer: layer.register_state_dict_pre_hook(nothing),
    "state_dict post-hook": lambda layer: layer.register_state_dict_post_hook(nothing),
    "load pre-hook": lambda layer: layer.register_load_state_dict_pre_hook(nothing),
    "load post-hook": lambda layer: layer.register_load_state_dict_post_hook(nothing),
    "hook of the weight": lambda layer: layer.weight.register_hook(nothing),
    "hook of the bias": lambda layer: layer.bias.register_hook(nothing),
    "hook of the summed gradient": lambda layer: layer.weight.register_post_accumulate_grad_hook(
        nothing
    ),
    "forward of its own": patched,
    "extra_repr of its own": lambda layer: setattr(layer, "extra_repr", str),
    "buffer": lambda layer: layer.register_buffer("scale", torch.ones(1)),
    "empty buffer": lambda layer: layer.register_buffer("scale", None),
    "submodule": lambda layer: layer.add_module("adapter", nn.Linear(64, 64)),
    "parameter": lambda layer: layer.register_parameter("more", nn.Parameter(torch.ones(1))),
    "tensor": lambda layer: setattr(layer, "importance", torch.ones(64)),
    "object": lambda layer: setattr(layer, "_hf_hook", object()),
    "function": lambda layer: setattr(layer, "callback", nothing),
    "tensor of the weight": lambda layer: setattr(layer.weight, "main_grad", torch.ones(1)),
    "weight norm": parametrizations.weight_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
    "gradient": lambda layer: layer(torch.ones(64)).sum().backward(),
    "weight of a subclass": lambda layer: setattr(
        layer, "weight", type("Quantized", (nn.Parameter,), {})(layer.weight.detach())
    ),
    "integers": lambda layer: setattr(
        layer, "weight", nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)
    ),
    "complex numbers": lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight.detach().to(torch.complex64))
    ),
}


@pytest.mark.parametrize("kind", ACTING)
def test_what_acts_on_a_layer_leaves_it_with_the_reason(kind):
    model = net()
    ACTING[kind](model[0])
    layer, before = model[0], set(vars(model[0]))
    report = convert(model)
    assert model[0] is layer
    assert report.left["0"]
    assert set(vars(layer)) == before


def test_a_hook_that_was_removed_leaves_nothing():
    model = net()
    for register in (model[0].register_forward_hook, model[0].weight.register_hook):
        register(nothing).remove()
    assert convert(model).replaced == ["0"]


class Colour(enum.Enum):
    RED = 1


def test_plain_attributes_go_to_the_new_layer_and_back():
    values = {
        "_is_hf_initialized": True,
        "note": "a word",
        "sizes": [1, (2, 3)],
        "table": {"a": None},
        "kind": Colour.RED,
        "wide": torch.float32,
    }
    model = net()
    for name, value in values.items():
        setattr(model[0], name, value)
        setattr(model[0].weight, name, value)
    model[0].bias._no_weight_decay = True
    for step in (lambda: convert(model), lambda: blockshock.revert(model)):
        step()
        for name, value in values.items():
            assert getattr(model[0], name) == value
            assert getattr(model[0].weight, name) == value
        assert model[0].bias._no_weight_decay
    assert type(model[0]) is nn.Linear
    assert set(vars(model[0])) == {*vars(nn.Linear(1, 1)), *values}


def test_an_attribute_that_the_new_layer_needs_itself_is_an_error_that_changes_nothing():
    model = net()
    model[1].policies = "mine"
    with pytest.raises(ValueError, match=r"'policies'.*rename"):
        convert(model, "*")
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_a_model_without_values_is_left():
    report = convert(net(device="meta"), "*")
    assert all("meta device" in reason for reason in report.left.values())
    assert list(report.left) == ["0", "1"]


def test_weights_that_share_memory_alone_are_left():
    model = net()
    model[1].weight.data = model[0].weight.data
    report = convert(model, "*")
    assert all("shared" in reason for reason in report.left.values())
    assert len(report.left) == 2


def test_an_optimizer_made_before_is_a_warning_and_the_report_says_what_to_put_in_it():
    model, true = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"SGD holds parameters that convert has replaced"):
        report = convert(model, "*")
    for group in optimizer.param_groups:
        group["params"] = [report.parameters.get(p, p) for p in group["params"]]
    own = torch.optim.SGD(true.parameters(), 0.1)
    for model_, optimizer_ in ((model, optimizer), (true, own)):
        model_(torch.ones(2, 64)).square().sum().backward()
        optimizer_.step()
    assert all(map(torch.equal, model.parameters(), true.parameters()))
    with pytest.warns(UserWarning, match=r"SGD holds parameters that revert has replaced"):
        blockshock.revert(model)


def test_the_report_holds_no_dense_weight():
    model = net()
    report = convert(model, "*")
    gc.collect()
    assert len(report.parameters) == 0


def test_an_optimizer_of_another_model_or_of_none_any_more_is_no_warning():
    other, model = net(), net()
    used = torch.optim.Adam(other.parameters())
    gone = torch.optim.Adam(model.parameters())
    gone.itself = gone  # only the collector finds that nobody uses it
    del gone
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blockshock.convert(model, "dense_single")
    assert used.param_groups


def test_a_where_that_asks_for_nothing_is_a_warning_and_changes_nothing():
    model = net()
    with pytest.warns(UserWarning, match="changed nothing"):
        report = blockshock.convert(model, "dense_single", where="")
    assert all("not asked for" in reason for reason in report.left.values())
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("where", [3, None, ["0"]])
def test_a_where_of_another_kind_is_refused_and_changes_nothing(where):
    model = net()
    with pytest.raises(ValueError, match=r"where = .* is neither.*'\*\.mlp\.\*'.*function of"):
        blockshock.convert(model, "dense_single", where=where)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_converting_twice_and_reverting_twice_change_nothing_more():
    model = net()
    convert(model, "0")
    layer = model[0]
    report = convert(model, "*")
    assert model[0] is layer
    assert report.replaced == ["1"]
    assert "already" in report.left["0"]
    assert blockshock.revert(model) == ["0", "1"]
    assert blockshock.revert(model) == []


def test_one_layer_alone_is_an_error_both_ways():
    layer = METHODS["dense_single"].from_dense(torch.ones(64, 64))
    with pytest.raises(ValueError, match="itself one converted layer"):
        blockshock.revert(layer)
    with pytest.raises(ValueError, match="itself one converted layer"):
        blockshock.convert(layer, "dense_single")


def test_a_layer_of_two_names_is_reverted_under_both():
    model = net()
    convert(model)
    model[1] = model[0]
    assert blockshock.revert(model) == ["0", "1"]
    assert model[0] is model[1]
    assert type(model[0]) is nn.Linear


def test_a_hook_on_a_converted_layer_must_go_before_it_is_reverted():
    model = net()
    convert(model)
    handle = model[0].register_forward_hook(nothing)
    with pytest.raises(ValueError, match=r"'0' cannot be reverted: it has hooks"):
        blockshock.revert(model)
    handle.remove()
    assert blockshock.revert(model) == ["0"]


@pytest.mark.parametrize("nested", [False, True])
def test_an_encoder_has_its_own_flag_and_no_hooks_after_revert(nested):
    options = {"dropout": 0.0, "batch_first": True}
    layer = nn.TransformerEncoderLayer(64, 2, 64, **options)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    convert(model, "layers.0.*")
    twin = copy.deepcopy(model)
    for one in (model, twin):
        convert(one, "*")
        assert not one.use_nested_tensor
        blockshock.revert(one)
        assert one.use_nested_tensor == nested
        assert {name: set(vars(module)) for name, module in one.named_modules()} == before
        assert not any(m._forward_pre_hooks for m in one.modules())


@pytest.mark.parametrize("made_in", [torch.inference_mode, torch.no_grad])
def test_a_model_converted_where_nothing_is_recorded_trains(made_in):
    with made_in():
        model = net()
        convert(model, "*")
    x = torch.ones(2, 64)
    model(x).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())
    with made_in():
        blockshock.revert(model)
    model(x).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())


def test_a_weight_that_is_not_contiguous_is_the_same_weight():
    model = net()
    model[0].weight.data = torch.randn(64, 64).t()
    weight, x = model[0].weight.detach().clone(), torch.randn(4, 64)
    bias = model[0].bias.detach().clone()
    convert(model)
    torch.testing.assert_close(model[0](x), F.linear(x, weight, bias))
