"""PyTorch's own kernels run by name or say why not, before they run."""

import functools
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

from blockshock.attention import METHODS, patterns, peers, reads, shapes, unsupported
from blockshock.attention.reference import reference
from tests.attention_checks import DEVICE, NAMES, relative, results, truth

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


def assert_matches_reference(method, tensors, d_out, most, **options):
    found = results(method, *tensors, d_out, **options)
    true = truth(*tensors, d_out, **options)
    for name_, own, exact in zip(NAMES, found, true, strict=True):
        error = relative(own, exact)
        assert error < most, f"{name_}: {error:.2e} of at most {most:.0e}"


def altered(changed, by):
    """`flash_torch`, with `by` added to every entry of its output or of one gradient."""

    def method(*tensors, **options):
        tensors = [x.view_as(x) for x in tensors]
        for of, x in zip(NAMES[1:], tensors, strict=True):
            if of == changed:
                x.register_hook(lambda gradient: gradient + by)
        return METHODS["flash_torch"](*tensors, **options) + by * (changed == "out")

    return method


@pytest.mark.parametrize(("Tq", "Tk"), [(20, 30), (20, 1)])  # of one key dq and dk are zero
def test_the_comparison_with_the_reference_passes_what_is_right(Tq, Tk):
    tensors, d_out = inputs(4, 2, Tq, Tk, grad=True)
    assert_matches_reference(METHODS["flash_torch"], tensors, d_out, 1e-5)


@pytest.mark.parametrize("changed", NAMES)
@pytest.mark.parametrize(("Tq", "Tk"), [(20, 30), (20, 1)])
def test_the_comparison_with_the_reference_tells_what_is_wrong(changed, Tq, Tk):
    tensors, d_out = inputs(4, 2, Tq, Tk, grad=True)
    with pytest.raises(AssertionError, match=rf"^{changed}: "):
        assert_matches_reference(altered(changed, 0.1), tensors, d_out, 0.01)


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
    monkeypatch.setattr(reads, "_KEPT", weakref.WeakKeyDictionary())
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
        ("flex", {"q_shape": (2, 4, 70, 64), "backward": True}, None),
        ("flex", {"device_type": "cpu", "backward": True}, "no backward on the CPU"),
        ("flex", {"dtype": torch.float64}, "dtype float64"),
        ("flex", {"q_shape": (2, 4, 9, 8), "k_shape": (2, 4, 9, 8)}, "D >= 16"),
        ("flex", {"q_shape": (2, 4, 0, 64)}, "Tq = 0"),
        ("flex", {"pattern": patterns.documents([3])}, r"documents\(3\)"),
        ("flash_torch", {"dtype": torch.float64, "backward": True}, None),
        ("flash_torch", {"pattern": patterns.band(2)}, "use block_sparse"),
        ("reference", {"pattern": patterns.band(2), "device_type": "cpu"}, None),
        ("reference", {"k_shape": (2, 3, 256, 64)}, "multiple of 3"),
        ("flash_triton", {"scale": 0.3}, None),
        ("flash_triton", {"scale": -0.3}, "scale = -0.3 must be positive.*negate q"),
        ("block_sparse", {"scale": 0.0}, "scale = 0.0 must be positive"),
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


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), 1e-60, 1e39])
@pytest.mark.parametrize("method", ["flash_triton", "block_sparse", "block_sparse_unpruned"])
def test_a_scale_that_the_call_refuses_is_known_beforehand_in_the_same_words(method, scale):
    tensors, _ = inputs(1, 1, 16, 16, device=DEVICE)
    with pytest.raises(ValueError, match="scale") as refusal:
        METHODS[method](*tensors, scale=scale)
    known = unsupported(method, *(x.shape for x in tensors[:2]), torch.float32, DEVICE, scale=scale)
    assert known == str(refusal.value)


@pytest.mark.parametrize("method", ["reference", "flash_torch"])
def test_a_negative_scale_is_told_to_run_where_it_runs(method):
    tensors, _ = inputs(1, 1, 16, 16)
    assert unsupported(method, *(x.shape for x in tensors[:2]), HALF, "cpu", scale=-1.0) is None
    torch.testing.assert_close(
        METHODS[method](*tensors, scale=-1.0), reference(-tensors[0], *tensors[1:], scale=1.0)
    )


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
@pytest.mark.parametrize(("pattern", "causal", "Tq", "Tk"), MASKS, ids=name)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_on_a_gpu_flex_takes_every_pattern(pattern, causal, Tq, Tk, kv_heads):
    tensors, d_out = inputs(4, kv_heads, Tq, Tk, 64, HALF, "cuda", grad=True)
    options = {"causal": causal, "pattern": pattern}
    assert_matches_reference(peers.flex, tensors, d_out, 0.01, **options)
    out = peers.flex(*tensors, **options)
    true = reference(*tensors, **options)
    assert (out[(true == 0).all(dim=-1)] == 0).all()


def test_the_reason_of_a_refusal_is_what_torch_warns_of():
    q, v = torch.ones(1, 1, 8, 16), torch.ones(1, 1, 8, 24)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        reason = peers._why_not(functools.partial(F.scaled_dot_product_attention, q, q, v))
    assert reason.startswith("Flash attention requires q,k,v to have the same last dimension")
    assert "Value.size(-1): 24" in reason
    assert "Triggered" not in reason


def test_the_reason_leaves_out_the_kernels_that_were_not_asked_for():
    def refused():  # as PyTorch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
        for kernel, reason in [
            ("Memory efficient", "Memory Efficient attention has been runtime disabled."),
            ("Flash attention", "Flash attention has been runtime disabled."),
            ("cuDNN attention", "head_dim should be no more than 256"),
        ]:
            for text in (f"{kernel} kernel not used because:", reason):
                warnings.warn(f"{text} (Triggered internally at sdp_utils.cpp:1.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    assert peers._why_not(refused) == "head_dim should be no more than 256"


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a CUDA build without a GPU ends in an error of CUDA",
)
def test_a_refusal_without_a_warning_is_told_in_the_words_of_the_error_and_with_the_sizes(
    monkeypatch,
):
    tensors, _ = inputs(4, 2, 9, 7)
    monkeypatch.setattr(peers.sdpa_cudnn, "unsupported", lambda *a, **options: None)
    told = (
        r"sdpa_cudnn cannot run here: No viable backend .*q \(2, 4, 9, 32\), k \(2, 2, 7, 32\), fl"
    )
    with pytest.raises(ValueError, match=told):  # the CPU has no such kernel
        peers.sdpa_cudnn(*tensors)


@pytest.mark.gpus(1)
@pytest.mark.parametrize("method", ["sdpa_flash", "sdpa_cudnn"])
def test_on_a_gpu_what_torch_refuses_is_an_error_with_its_reason(method, monkeypatch, capfd):
    tensors, _ = inputs(2, 2, 64, 64, 264, HALF, "cuda")
    monkeypatch.setattr(METHODS[method], "unsupported", lambda *a, **options: None)
    for _ in range(2):  # the reason is told each time
        with pytest.raises(ValueError, match=rf"{method} cannot run here: .*\b(256|128)\b") as told:
            METHODS[method](*tensors)
        assert "disabled" not in str(told.value)
        assert "q (2, 2, 64, 264)" in str(told.value)
    assert "sdp_utils" not in capfd.readouterr().err


@pytest.mark.gpus(1)
@pytest.mark.parametrize("method", ["sdpa_flash", "sdpa_cudnn"])
def test_on_a_gpu_inputs_may_be_views_of_any_strides(method):
    tensors, _ = inputs(2, 2, 64, 64, 64, HALF, "cuda")
    views = [x.mT for x in tensors]
    assert relative(METHODS[method](*views), reference(*(x.double() for x in views))) < 0.01
