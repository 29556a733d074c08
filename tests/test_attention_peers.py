"""PyTorch's own kernels run by name or say why not, before they run."""

import gc
import weakref

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from blockshock.attention import METHODS, patterns, peers, shapes, unsupported
from blockshock.attention.reference import reference

CUDA = torch.cuda.is_available()
SOME = (2, 4, 256, 64)
HALF = torch.bfloat16

MASK = torch.rand(2, 4, 70, 50, generator=torch.Generator().manual_seed(0)) > 0.8
MASKS = [  # pattern, causal, Tq, Tk
    (None, False, 70, 50),
    (None, True, 70, 50),
    (patterns.band(9), True, 50, 70),
    (patterns.band(3), False, 300, 140),  # more queries than keys see anything
    (patterns.documents([30, 1, 39]), True, 70, 70),
    (patterns.random_blocks(16, 0.3), False, 150, 130),
    (patterns.random_blocks(16, 0.3, per_head=True), True, 150, 130),
    (patterns.strided(8, 2), True, 130, 130),
    (patterns.global_band(3, 4), False, 130, 257),
    (patterns.from_mask(MASK), False, 70, 50),
    (patterns.predicate(lambda b, h, i, j: (i == 140) & (j == 3), "one pair"), False, 150, 9),
    (patterns.from_mask(torch.zeros(40, 40, dtype=torch.bool)), False, 40, 40),
]


def name(value):
    return value.name if isinstance(value, patterns.Pattern) else str(value)


def inputs(heads, kv_heads, Tq, Tk, D=32, dtype=torch.float32, device="cpu", grad=False):
    generator = torch.Generator().manual_seed(0)
    sizes = [(heads, Tq), (kv_heads, Tk), (kv_heads, Tk), (heads, Tq)]
    drawn = [torch.randn(2, *size, D, generator=generator) for size in sizes]
    *tensors, d_out = (x.to(device, dtype) for x in drawn)
    return [x.requires_grad_(grad) for x in tensors], d_out


def relative(own, true):
    return float((own.double() - true).norm() / true.norm().clamp(min=1e-30))


def assert_matches_reference(method, tensors, d_out, most, **options):
    out = method(*tensors, **options)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    true = reference(*exact, **options)
    own_gradients = torch.autograd.grad(out, tensors, d_out)
    true_gradients = torch.autograd.grad(true, exact, d_out.double())
    for own, expected in zip([out, *own_gradients], [true, *true_gradients], strict=True):
        assert relative(own, expected) < most


@pytest.mark.parametrize(("pattern", "causal", "Tq", "Tk"), MASKS, ids=name)
def test_flex_is_the_reference_on_the_cpu(pattern, causal, Tq, Tk):
    tensors, _ = inputs(4, 2, Tq, Tk)
    out = peers.flex(*tensors, causal=causal, pattern=pattern, scale=0.3)
    true = reference(*tensors, causal=causal, pattern=pattern, scale=0.3)
    torch.testing.assert_close(out, true)


@pytest.mark.parametrize(("pattern", "causal", "Tq", "Tk"), MASKS[1:], ids=name)
@pytest.mark.parametrize("chunk", [1, peers.CHUNK])
def test_the_block_mask_is_the_one_that_torch_makes(pattern, causal, Tq, Tk, chunk, monkeypatch):
    monkeypatch.setattr(peers, "CHUNK", chunk)
    monkeypatch.setattr(peers, "_block_masks", weakref.WeakKeyDictionary())
    shape = shapes.Shape(batch=2, heads=4, kv_heads=2, Tq=Tq, Tk=Tk, D=32)
    ours = peers.block_mask(pattern, shape, causal=causal, device="cpu")
    # In torch's own making a mask is told from a score by its number of named arguments.
    rule = lambda b, h, i, j: ours.mask_mod(b, h, i, j)  # noqa: E731
    theirs = create_block_mask(rule, *ours.shape, device="cpu")
    for part in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, part), getattr(theirs, part)), part
    for part in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
        assert torch.equal(getattr(ours, part), getattr(theirs, part)), part
    assert ours.shape[-2:] == (Tq, Tk)


def test_a_block_mask_is_made_once_and_lives_as_long_as_its_pattern():
    shape = shapes.Shape(batch=1, heads=1, kv_heads=1, Tq=40, Tk=40, D=32)
    pattern = patterns.from_mask(torch.ones(40, 40, dtype=torch.bool).triu())
    first = peers.block_mask(pattern, shape, causal=False, device="cpu")
    assert peers.block_mask(pattern, shape, causal=False, device=torch.device("cpu")) is first
    assert peers.block_mask(pattern, shape, causal=True, device="cpu") is not first
    joined = peers.block_mask(pattern, shape, causal=True, device="cpu")
    assert peers.block_mask(pattern, shape, causal=True, device="cpu") is joined
    gone = weakref.ref(first)
    del first, joined, pattern
    gc.collect()
    assert gone() is None


def test_flex_meets_many_masks_without_an_end():
    tensors, _ = inputs(1, 1, 20, 20)
    for window in range(20):  # more than PyTorch's own limit of compilations
        pattern = patterns.causal_band(window)
        out = peers.flex(*tensors, pattern=pattern)
        torch.testing.assert_close(out, reference(*tensors, pattern=pattern))


def test_flex_on_the_cpu_is_for_looking_not_for_training():
    tensors, _ = inputs(2, 2, 20, 20, grad=True)
    with pytest.raises(ValueError, match="no backward on the CPU; use flash_torch"):
        peers.flex(*tensors)
    with torch.no_grad():
        out = peers.flex(*tensors)
    torch.testing.assert_close(out, reference(*tensors).detach())


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_run_says_so_without_running(method):
    if CUDA:
        pytest.skip("on a CPU the reasons and what happens can be compared")
    reason = unsupported(method, SOME, SOME, torch.float32, "cpu", True)
    tensors, _ = inputs(4, 4, 16, 16)
    if reason is None:
        torch.testing.assert_close(
            METHODS[method](*tensors, causal=True),
            reference(*tensors, causal=True),
            atol=1e-3,
            rtol=1e-3,
        )
    else:
        with pytest.raises(ValueError, match=reason.split(";")[0].split(":")[0]):
            METHODS[method](*tensors, causal=True)


@pytest.mark.parametrize(
    ("method", "change", "told"),
    [
        ("sdpa_flash", {}, None),
        ("sdpa_flash", {"causal": True}, None),
        ("sdpa_flash", {"q_shape": (2, 4, 256, 256), "k_shape": (2, 2, 100, 256)}, None),
        ("sdpa_flash", {"device_type": "cpu"}, "CUDA only, not on cpu"),
        ("sdpa_flash", {"dtype": torch.float32}, "dtype float32.*float16, bfloat16"),
        ("sdpa_flash", {"k_shape": (2, 4, 100, 64), "causal": True}, "Tq = 256, Tk = 100"),
        ("sdpa_flash", {"q_shape": (2, 4, 9, 272), "k_shape": (2, 4, 9, 272)}, "D <= 256"),
        ("sdpa_flash", {"k_shape": (2, 4, 0, 64)}, "Tk = 0"),
        ("sdpa_flash", {"pattern": patterns.band(2)}, r"band\(2\).*use block_sparse"),
        ("sdpa_cudnn", {"k_shape": (2, 4, 100, 64), "causal": True}, None),
        ("sdpa_cudnn", {"q_shape": (2, 4, 9, 72), "k_shape": (2, 4, 9, 72)}, None),
        ("sdpa_cudnn", {"q_shape": (2, 4, 9, 68), "k_shape": (2, 4, 9, 68)}, "multiples of 8"),
        ("sdpa_cudnn", {"q_shape": (2, 4, 9, 264), "k_shape": (2, 4, 9, 264)}, "takes D <= "),
        ("sdpa_cudnn", {"k_shape": (2, 4, 1, 64)}, "at least 2 keys"),
        ("sdpa_cudnn", {"device_type": "cpu"}, "CUDA only"),
        ("sdpa_cudnn", {"pattern": patterns.full()}, "use block_sparse"),
        ("flex", {"pattern": patterns.band(2), "dtype": torch.float32}, None),
        ("flex", {"device_type": "cpu"}, None),
        ("flex", {"q_shape": (2, 4, 70, 64)}, None),
        ("flex", {"q_shape": (2, 4, 70, 64), "backward": True}, "fewer than 128"),
        ("flex", {"device_type": "cpu", "backward": True}, "no backward on the CPU"),
        ("flex", {"dtype": torch.float64}, "dtype float64"),
        ("flex", {"q_shape": (2, 4, 9, 8), "k_shape": (2, 4, 9, 8)}, "D >= 16"),
        ("flex", {"q_shape": (2, 4, 0, 64)}, "Tq = 0"),
        ("flex", {"pattern": patterns.documents([3])}, r"documents\(3\)"),
        ("flash_torch", {"dtype": torch.float64, "backward": True}, None),
        ("flash_torch", {"pattern": patterns.band(2)}, "use block_sparse"),
        ("reference", {"pattern": patterns.band(2), "device_type": "cpu"}, None),
        ("reference", {"k_shape": (2, 3, 256, 64)}, "multiple of 3"),
    ],
)
def test_reasons_are_known_beforehand(method, change, told):
    usual = {"q_shape": SOME, "k_shape": SOME, "dtype": HALF, "device_type": "cuda"}
    reason = unsupported(method, **(usual | change))
    if told is None:
        assert reason is None
    else:
        with pytest.raises(ValueError, match=told):
            raise ValueError(reason)


def test_an_unknown_method_lists_the_known():
    with pytest.raises(ValueError, match="unknown method 'flash'; use one of reference, sdpa_fl"):
        unsupported("flash", SOME, SOME, HALF, "cuda")


@pytest.mark.gpus(1)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("Tq", "Tk"), [(256, 256), (63, 63), (1000, 1000), (63, 100), (100, 63)])
@pytest.mark.parametrize("method", ["sdpa_flash", "sdpa_cudnn", "flex"])
def test_on_a_gpu_output_and_gradients_match_the_reference(method, Tq, Tk, kv_heads, causal):
    tensors, d_out = inputs(4, kv_heads, Tq, Tk, 64, HALF, "cuda", grad=True)
    shape = tensors[0].shape, tensors[1].shape
    reason = unsupported(method, *shape, HALF, "cuda", causal, backward=True)
    if reason:
        pytest.skip(reason)
    assert_matches_reference(METHODS[method], tensors, d_out, 0.01, causal=causal)


@pytest.mark.gpus(1)
@pytest.mark.parametrize(("pattern", "causal", "Tq", "Tk"), MASKS[:-1], ids=name)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_on_a_gpu_flex_takes_every_pattern(pattern, causal, Tq, Tk, kv_heads):
    if Tq < 128:
        pytest.skip("FlexAttention has no kernel with gradients for so few queries")
    tensors, d_out = inputs(4, kv_heads, Tq, Tk, 64, HALF, "cuda", grad=True)
    options = {"causal": causal, "pattern": pattern}
    assert_matches_reference(peers.flex, tensors, d_out, 0.01, **options)
    out = peers.flex(*tensors, **options)
    true = reference(*tensors, **options)
    assert (out[(true == 0).all(dim=-1)] == 0).all()


@pytest.mark.gpus(1)
@pytest.mark.parametrize("method", ["sdpa_flash", "sdpa_cudnn"])
def test_on_a_gpu_what_torch_refuses_is_an_error_with_its_reason(method, monkeypatch):
    tensors, _ = inputs(2, 2, 64, 64, 264, HALF, "cuda")
    monkeypatch.setattr(METHODS[method], "unsupported", lambda *a, **options: None)
    with pytest.raises(ValueError, match=rf"{method} cannot run here: .*(256|128)"):
        METHODS[method](*tensors)


@pytest.mark.gpus(1)
@pytest.mark.parametrize("method", ["sdpa_flash", "sdpa_cudnn"])
def test_on_a_gpu_inputs_may_be_views_of_any_strides(method):
    tensors, _ = inputs(2, 2, 64, 64, 64, HALF, "cuda")
    views = [x.mT for x in tensors]
    assert relative(METHODS[method](*views), reference(*(x.double() for x in views))) < 0.01
