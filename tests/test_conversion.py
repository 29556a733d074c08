"""A converted model is the dense model, held differently: outputs, gradients, state, and back."""

import copy

import pytest
import torch
from torch import nn

import blockshock
from blockshock.distributed import collectives
from blockshock.distributed.ranks import device
from blockshock.linear import METHODS
from blockshock.measure.errors import relative_error

EXACT = 1e-8  # a rounding error below float32's own: a bias gradient of few addends may be exact
METHOD_NAMES = [name for name in METHODS if name != "dense_single"]


class Model(nn.Module):
    """Two linear layers that fit, one too narrow, one tied to an embedding, and attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(192, 128)
        self.attention = nn.MultiheadAttention(128, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128, bias=False))
        self.narrow = nn.Linear(128, 63)
        self.head = nn.Linear(128, 192, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mlp(x)
        return self.head(x), self.narrow(x)


def model():
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    return Model().to(device(), dtype)


def run(net):
    """The logits, and the gradient of each parameter by name."""
    tokens = torch.arange(96, device=device()).view(8, 12)
    outputs = net(tokens)
    torch.manual_seed(1)
    upstream = [torch.randn(y.shape).bfloat16().to(y) for y in outputs]
    torch.autograd.backward(outputs, upstream)
    return {"logits": outputs[0].detach(), **{n: p.grad for n, p in net.named_parameters()}}


def converted(method, **options):
    """The converted model's errors over the dense model's, both against float64."""
    true, dense = run(model().double()), run(model())
    net = model()
    report = blockshock.convert(net, method, **options)
    split = {f"{name}.weight" for name in report.replaced}
    ratios = {
        name: relative_error(value, true[name])
        / max(relative_error(dense[name], true[name]), EXACT)
        for name, value in run(net).items()
        if name not in split
    }
    return {"replaced": report.replaced, "left": report.left, "ratios": ratios}


def round_trip(method):
    dense, net = model(), model()
    blockshock.convert(net, method)
    saved = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    net.load_state_dict(saved)
    blockshock.revert(net)
    back = net.state_dict()
    return list(back) == list(dense.state_dict()) and all(
        torch.equal(value, back[name]) for name, value in dense.state_dict().items()
    )


def moved_and_copied(method):
    """Outputs after a deep copy, a cast there and back, and a state of another mask."""
    x = torch.randn(16, 128, device=device()).to(torch.bfloat16)
    weight = torch.randn(192, 128, device=device()).to(torch.bfloat16)
    layer = METHODS[method].from_dense(weight)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
    equal = [torch.equal(twin(x), expected)]
    equal.append(torch.equal(twin.to(torch.float16).to(torch.bfloat16)(x), expected))
    if method == "block_shock":
        other = METHODS[method].from_dense(weight, mask="tile_magnitude")
        twin.load_state_dict(other.state_dict())
        equal.append(torch.equal(twin(x), other(x)))
        equal.append(torch.equal(twin.to_dense(), weight))
    return equal


def frozen_flags(method):
    net = model()
    net.mlp[0].weight.requires_grad_(False)
    net.eval()
    blockshock.convert(net, method, where="mlp.0")
    return net.mlp[0].weight.requires_grad, net.mlp[0].bias.requires_grad, net.mlp[0].training


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_outputs_and_gradients_are_the_dense_models(ranks, method):
    for answer in ranks.run(converted, method):
        assert "mlp.0" in answer["replaced"]
        assert {"logits", "embed.weight", "mlp.0.bias"} <= set(answer["ratios"])
        assert all(ratio < 2 for ratio in answer["ratios"].values()), answer["ratios"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *[(name, {"reduce": "collective"}) for name in METHOD_NAMES],
        ("block_shock", {"kernel": "folded", "mask": "1010", "reduce": "collective"}),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value,
)
def test_the_kernel_and_the_sum_asked_for_are_those_of_the_layers(ranks, method, options):
    for answer in ranks.run(converted, method, **options):
        assert "mlp.0" in answer["replaced"]
        assert all(ratio < 2 for ratio in answer["ratios"].values()), answer["ratios"]
    for answer in ranks.run(made_of, method, **options):
        assert answer == {name: options[name] for name in options if name != "mask"}


def made_of(method, **options):
    """The options as the first converted layer holds them."""
    net = model()
    blockshock.convert(net, method, **options)
    held = {"reduce": net.mlp[0].output.how, "kernel": getattr(net.mlp[0], "kernel", None)}
    return {name: held[name] for name in options if name != "mask"}


def refused_here(options):
    """The warning, and the reason why mlp.0 was left."""
    net = model()
    with pytest.warns(UserWarning, match="changed nothing") as caught:
        report = blockshock.convert(net, "block_shock", where="mlp.*", **options)
    return str(caught[0].message), report.replaced, report.left["mlp.0"]


def test_a_kernel_that_the_mask_does_not_allow_leaves_every_layer_with_a_warning(ranks):
    for warning, replaced, reason in ranks.run(refused_here, {"kernel": "folded", "mask": "tile"}):
        assert not replaced
        assert "'folded'" in reason
        assert reason in warning


def test_a_sum_that_needs_gpus_leaves_every_layer_with_a_warning(ranks):
    if ranks.device != "cpu":
        pytest.skip("here the ranks have GPUs")
    for warning, replaced, reason in ranks.run(refused_here, {"reduce": "exchange"}):
        assert not replaced
        assert "needs GPUs" in reason
        assert reason in warning


def test_what_is_left_is_listed_with_its_reason(ranks):
    answer = ranks.run(converted, "block_shock")[0]
    assert answer["replaced"] == ["mlp.0", "mlp.2"]
    assert "63" in answer["left"]["narrow"]
    assert "shared" in answer["left"]["head"]
    assert "subclass" in answer["left"]["attention.out_proj"]


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_state_dict_round_trip_and_revert_give_the_dense_state(ranks, method):
    assert all(ranks.run(round_trip, method))


@pytest.mark.parametrize("method", ["block_shock", "block_shock_folded", "masked_split"])
def test_copies_casts_and_loaded_masks_are_followed(ranks, method):
    for equal in ranks.run(moved_and_copied, method):
        assert all(equal), equal


def test_flags_of_the_dense_layer_are_kept(ranks):
    assert ranks.run(frozen_flags, "block_shock") == [(False, True, False)] * ranks.size


def test_an_unknown_method_or_option_is_refused():
    with pytest.raises(ValueError, match="block_shock_folded"):
        blockshock.convert(nn.Sequential(nn.Linear(64, 64)), "blockshock")
    with pytest.raises(ValueError, match="pattern"):
        blockshock.convert(nn.Sequential(nn.Linear(64, 64)), "dense_single", pattern="1100")
    for wrong in ({"mask": "0110"}, {"kernel": "thick"}, {"reduce": "two_shots"}):
        with pytest.raises(ValueError, match="use one of"):
            blockshock.convert(nn.Sequential(nn.Linear(64, 64)), "block_shock", **wrong)
    with pytest.raises(ValueError, match="from_dense"):
        blockshock.convert(nn.Linear(64, 64), "dense_single")


def test_what_is_shared_hooked_or_computed_is_left_and_a_failure_changes_nothing():
    shared = nn.Linear(64, 64)
    hooked, computed = nn.Linear(64, 64), nn.utils.spectral_norm(nn.Linear(64, 64))
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": hooked, "d": computed})
    with pytest.warns(UserWarning, match="changed nothing"):
        report = blockshock.convert(model, "dense_single")
    assert not report.replaced
    assert {name: reason.split()[-1] for name, reason in report.left.items()} == {
        "a": "module",
        "b": "module",
        "c": "lost",
        "d": "held",
    }
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        blockshock.convert(model, "dense_single")
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def different_replicas():
    torch.manual_seed(collectives.group_rank())
    try:
        blockshock.convert(nn.Sequential(nn.Linear(128, 64)).to(device(), torch.bfloat16),
                           "block_shock", mask="magnitude")  # fmt: skip
    except ValueError as error:
        return str(error)
    return None


def test_ranks_with_different_weights_are_refused(ranks):
    assert all("broadcast the model" in answer for answer in ranks.run(different_replicas))


def loaded_nonsense():
    layer = METHODS["block_shock"].from_dense(
        torch.ones(64, 128, device=device(), dtype=torch.bfloat16)
    )
    state = layer.state_dict()
    before = layer.codes.clone()
    layer.packed.codes.zero_()
    state["_extra_state"] = layer.get_extra_state()
    layer.packed.codes.copy_(before)
    try:
        layer.load_state_dict(state)
    except RuntimeError as error:
        return str(error) if torch.equal(layer.codes, before) else None
    return None


def test_codes_that_are_no_mask_are_refused_when_they_are_loaded(ranks):
    assert all("no 2:4 mask" in answer for answer in ranks.run(loaded_nonsense))


def test_without_ranks_the_split_methods_leave_every_layer_and_say_why():
    if collectives.group_size() > 1:
        pytest.skip("this process is one of torchrun's ranks")
    with pytest.warns(UserWarning, match="even number of ranks"):
        report = blockshock.convert(nn.Sequential(nn.Linear(64, 64)), "block_shock")
    assert not report.replaced
    assert "even number of ranks" in report.left["0"]
    assert "even number of ranks" in str(report)
