"""What inputs, targets and losses promise: the same seed, the same bits, and their names hold."""

import numpy
import pytest
import torch
from safetensors.torch import save_file

from blockshock import workloads

CPU = {"dtype": torch.float32, "device": "cpu"}
GENERATED = tuple(kind for kind in workloads.INPUTS if kind != "file")
ACTIVATIONS = tuple(workloads.ACTIVATIONS)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def make(kind, B=96, K=200, *, seed=0, **options):
    return workloads.make_input(kind, B, K, seed=seed, **(CPU | options))


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@pytest.mark.parametrize("kind", GENERATED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("B", "K"), [(1, 64), (63, 100), (130, 7), (0, 8)])
def test_inputs_have_their_shape_and_are_finite(kind, dtype, B, K):
    x = workloads.make_input(kind, B, K, dtype=dtype, device="cpu", seed=0)
    assert x.shape == (B, K)
    assert x.dtype == dtype
    assert x.is_contiguous()
    assert x.isfinite().all()


@pytest.mark.parametrize("kind", GENERATED)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(kind):
    x = make(kind, 1100, 72)
    assert torch.equal(make(kind, 1100, 72), x)
    assert torch.equal(make(kind, 1100, 72, dtype=torch.bfloat16), x.bfloat16())
    other = make(kind, 1100, 72, seed=1)
    assert not torch.equal(other, x)
    assert abs(correlation(other - other.mean(0), x - x.mean(0))) < 0.05
    first, second = x[:76], x[1024:]  # the rows of two blocks
    assert abs(correlation(first - first.mean(0), second - second.mean(0))) < 0.2


@pytest.mark.parametrize("kind", GENERATED)
def test_every_input_has_values_worth_multiplying(kind):
    x = make(kind, 256, 256)
    assert 0.2 < x.std() < 5
    assert (x.std(dim=0) > 0).float().mean() > 0.99
    assert (x.std(dim=1) > 0).all()


def test_gaussian_is_standard_normal():
    x = make("gaussian", 512, 512)
    assert x.mean().abs() < 0.01
    assert x.std().item() == pytest.approx(1, rel=0.01)
    assert ((x.abs() < 1).float().mean() - 0.6827).abs() < 0.005


def test_uniform_fills_its_range_evenly():
    x = make("uniform", 512, 512)
    assert -1 <= x.min() < -0.999
    assert 0.999 < x.max() < 1
    counts = x.flatten().histc(bins=10, min=-1, max=1)
    assert (counts / x.numel() - 0.1).abs().max() < 0.005


@pytest.mark.parametrize("clip", [3.0, 0.5])
def test_activation_is_clipped_and_its_channels_differ_in_scale(clip):
    x = make("activation", 512, 256, clip=clip)
    assert x.abs().max() == clip
    assert 0.02 < (x.abs() == clip).float().mean() < 0.9
    scale = make("activation", 2048, 256, clip=1e4).std(dim=0)
    assert scale.max() / scale.min() > 10
    with pytest.raises(ValueError, match="clip = 0"):
        make("activation", clip=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_has_the_range_of_its_activation(activation):
    x = make("mlp", 512, 256, activation=activation)
    least = {"relu": 0.0, "gelu": -0.17, "silu": -0.2785}
    if activation == "swiglu":
        assert (x < 0).float().mean() == pytest.approx(0.5, abs=0.02)
    else:
        assert x.min().item() == pytest.approx(least[activation], abs=1e-3)
        assert x.max() > 3
    if activation == "relu":
        assert 0.3 < (x == 0).float().mean() < 0.9
    channels = x.mean(dim=0), make("mlp", 512, 256, seed=1, activation=activation).mean(dim=0)
    if activation != "swiglu":
        assert channels[0].std() > 0.1
        assert abs(correlation(*channels)) < 0.3


def test_swiglu_is_silu_of_a_gate_times_a_normal():
    gate, x = (make("mlp", 1024, 256, activation=name).double() for name in ("silu", "swiglu"))
    hidden = x / gate
    hidden = hidden / hidden.std(dim=0)
    assert hidden.pow(4).mean().item() == pytest.approx(3, abs=0.1)  # the normal's own


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_channels_keep_their_scale_from_block_to_block(activation):
    blocks = make("mlp", 2048, 256, activation=activation).view(2, 1024, 256).std(dim=1)
    assert correlation(*blocks) > 0.9
    assert blocks.std(dim=1).min() > 0.2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_normed_mlp_rows_have_mean_0_and_variance_1(activation):
    x = make("mlp", 64, 256, activation=activation, layer_norm=True)
    assert x.mean(dim=1).abs().max() < 1e-5
    assert (x.var(dim=1, correction=0) - 1).abs().max() < 1e-3
    plain = make("mlp", 64, 256, activation=activation)
    torch.testing.assert_close(x, torch.nn.functional.layer_norm(plain, (256,)))


def test_attention_mixes_the_same_few_values_in_every_row():
    x = make("attention", 256, 128, dtype=torch.float64, context=8)
    for head in (x[:, :64], x[:, 64:]):
        values = torch.linalg.svdvals(head)
        assert values[8] < 1e-5 * values[0]  # 8 values span 8 dimensions of 64
        assert values[7] > 1e-3 * values[0]
    alone = make("attention", 64, 128, context=1)
    assert (alone == alone[0]).all()  # a softmax over one value is 1
    # a mix stays inside the range of what it mixes: two halves of one stream see the same values
    long = make("attention", 1100, 64, dtype=torch.float64, context=8)
    assert torch.linalg.matrix_rank(long, rtol=1e-5) == 8
    with pytest.raises(ValueError, match="context = 0"):
        make("attention", context=0)


def test_conv_is_non_negative_smooth_and_made_of_overlapping_patches():
    x = make("conv", 128, 90)
    assert x.min() == 0
    assert 0.3 < (x == 0).float().mean() < 0.8
    patches = x.view(2, 8, 8, 10, 3, 3)  # image, place, channel, place in the patch
    assert torch.equal(patches[:, :, 1:, :, :, 0], patches[:, :, :-1, :, :, 1])
    assert torch.equal(patches[:, 1:, :, :, 0], patches[:, :-1, :, :, 1])
    assert (patches[:, 0, :, :, 0] == 0).all()  # the padding
    centre = patches[..., 1, 1]
    assert correlation(centre[:, :, 1:], centre[:, :, :-1]) > 0.7


@pytest.mark.parametrize("kind", GENERATED)
def test_inputs_and_weights_on_a_gpu_are_seeded_there(kind):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, found none")
    on_gpu = {"dtype": torch.float16, "device": "cuda", "seed": 0}
    x = workloads.make_input(kind, 1100, 256, **on_gpu)
    assert x.is_cuda
    assert x.isfinite().all()
    assert torch.equal(workloads.make_input(kind, 1100, 256, **on_gpu), x)
    weight = workloads.SeededWeight(700, 64, **on_gpu)
    assert torch.equal(weight.rows(0, 700)[100:600], weight.rows(100, 600))


def test_unknown_kinds_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="input 'noise'; use one of gaussian, uniform"):
        make("noise")
    with pytest.raises(ValueError, match="target 'ones'; use one of zeros, normal, uniform"):
        workloads.make_target("ones", 2, seed=0, **CPU)
    with pytest.raises(ValueError, match="activation 'tanh'; use one of gelu, silu, relu, swiglu"):
        make("mlp", activation="tanh")


def test_activations_from_a_file_are_its_first_rows(tmp_path):
    path = tmp_path / "model.safetensors"
    tokens = torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(0)).half()
    save_file({"tokens": tokens, "bias": torch.zeros(64)}, path)
    x = make("file", 7, 12, path=path, name="tokens", dtype=torch.float16)
    assert torch.equal(x, tokens.flatten(0, 1)[:7])
    assert torch.equal(make("file", 15, 12, path=path, name="tokens"), tokens.view(15, 12).float())
    with pytest.raises(ValueError, match="has 15 rows, the case reads at least 16"):
        make("file", 16, 12, path=path, name="tokens")
    with pytest.raises(ValueError, match=r"shape \(5, 3, 12\): .* K = 16; set K = 12"):
        make("file", 4, 16, path=path, name="tokens")
    with pytest.raises(ValueError, match=r"shape \(64,\)"):
        make("file", 4, 64, path=path, name="bias")
    numpy.save(tmp_path / "x.npy", numpy.full((8, 4), 1e5, dtype=numpy.float32))
    with pytest.raises(ValueError, match="file input is inf at row 0, column 0"):
        make("file", 8, 4, path=tmp_path / "x.npy", dtype=torch.float16)


def test_activations_that_span_several_blocks_are_read_whole(tmp_path):
    values = torch.arange(1500 * 4, dtype=torch.float32).view(100, 15, 4)
    numpy.save(tmp_path / "x.npy", values.numpy())
    x = make("file", 1400, 4, path=tmp_path / "x.npy")
    assert torch.equal(x, values.flatten(0, 1)[:1400])


@pytest.mark.parametrize("kind", workloads.TARGETS)
def test_targets_are_seeded_and_what_they_are_named(kind):
    target = workloads.make_target(kind, 3, 64, 64, dtype=torch.bfloat16, device="cpu", seed=0)
    assert target.shape == (3, 64, 64)
    assert target.dtype == torch.bfloat16
    again = workloads.make_target(kind, 3, 64, 64, dtype=torch.bfloat16, device="cpu", seed=0)
    assert torch.equal(target, again)
    std = {"zeros": 0, "normal": 1, "uniform": 3**-0.5}[kind]
    assert target.float().std().item() == pytest.approx(std, rel=0.03)
    assert target.float().mean().abs() < 0.03
    if kind == "uniform":
        assert target.abs().max() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_are_what_they_are_named_computed_wide(dtype):
    generator = torch.Generator().manual_seed(0)
    y = (torch.randn(64, 32, generator=generator) + 100).to(dtype).requires_grad_()
    target = torch.randn(64, 32, generator=generator).to(dtype)
    wide, wide_target = y.detach().double(), target.double()
    expected = {
        "sum": (wide.sum(), torch.ones_like(wide)),
        "mse_zero": (wide.square().mean(), 2 * wide / wide.numel()),
        "mse_target": (
            (wide - wide_target).square().mean(),
            2 * (wide - wide_target) / wide.numel(),
        ),
    }
    assert set(expected) == set(workloads.LOSSES)
    for name, (value, gradient) in expected.items():
        loss = workloads.LOSSES[name](y, target)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # mse_target rounds the difference to dtype, the sums are wide.
        rounding = torch.finfo(dtype).eps / 2 if name == "mse_target" else 0
        assert loss.item() == pytest.approx(value.item(), rel=max(1e-5, rounding))
        (grad,) = torch.autograd.grad(loss, y)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, gradient.to(dtype), rtol=1e-2, atol=1e-6)


def test_losses_without_use_for_a_target_take_none_and_mse_target_insists():
    y = torch.ones(4, 2)
    assert workloads.LOSSES["sum"](y, None).item() == 8
    assert workloads.LOSSES["mse_zero"](y, None).item() == pytest.approx(1)
    for target, shape in ((None, "None"), (torch.ones(2), r"\(2,\)")):
        with pytest.raises(ValueError, match=rf"a target of shape {shape} for .* \(4, 2\)"):
            workloads.LOSSES["mse_target"](y, target)
