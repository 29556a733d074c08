"""PyTorch's own attention kernels, each by its name: exactly that kernel runs, or none.

    sdpa_flash   FlashAttention-2 as built into PyTorch (Dao, arXiv:2307.08691)
    sdpa_cudnn   cuDNN's attention
    flex         FlexAttention (Dong et al., arXiv:2412.05496): the kernel is compiled for the mask

`scaled_dot_product_attention` chooses among kernels by itself; here one is left to choose from.
What FlexAttention compiles skips the 128×128 blocks in which nothing attends, by a block mask that
is made once for a pattern and these sizes.
"""

import functools
import importlib
import warnings
from collections import OrderedDict
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from blockshock.attention import patterns, reads, shapes

SIDE = 128  # queries, and keys, of one block of the mask
KEPT = 16  # block masks of one pattern
CHUNK = 1 << 24  # entries of the mask that are held at once
COMPILATIONS = 256  # each mask, size and dtype needs one; PyTorch's own limit is 8
# For fewer than 128 queries FlexAttention has a second kernel (flex_decoding.py in PyTorch's
# inductor), with no tiles for a mask where Tq · heads / kv_heads > SIDE: so always the first.
FLEX_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


def sdpa_flash(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool | str = False, pattern=None, scale=None
) -> Tensor:
    """q [batch, heads, Tq, D], k and v [batch, kv_heads, Tk, D] -> [batch, heads, Tq, D].

    fp16 or bf16 on CUDA, D <= 256; causal only where Tq = Tk. An input whose last dimension is not
    contiguous is copied.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit or that the kernel refuses; a pattern.
    """
    return _sdpa(sdpa_flash, q, k, v, causal, pattern, scale)


def sdpa_cudnn(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool | str = False, pattern=None, scale=None
) -> Tensor:
    """q [batch, heads, Tq, D], k and v [batch, kv_heads, Tk, D] -> [batch, heads, Tq, D].

    fp16 or bf16 on CUDA, D <= 128 and a multiple of 8 (newer cuDNN: to 256). An input whose last
    dimension is not contiguous is copied.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit or that the kernel refuses; a pattern.
    """
    return _sdpa(sdpa_cudnn, q, k, v, causal, pattern, scale)


def flex(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool | str = False, pattern=None, scale=None
) -> Tensor:
    """q [batch, heads, Tq, D], k and v [batch, kv_heads, Tk, D] -> [batch, heads, Tq, D].

    On CUDA: compiled for the mask and the sizes when they are first seen; fp16, bf16 or float32,
    D >= 16. On the CPU: FlexAttention's own unfused form (all scores at once), which needs no
    compiler and has no backward; it shows what is computed, not how fast.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or that FlexAttention refuses.
    """
    shape = _checked(flex, q, k, v, causal, pattern, scale)
    if not shapes.gradients_wanted(q, k, v):
        q, k, v = q.detach(), k.detach(), v.detach()  # else the CPU refuses, even under no_grad
    run = _flex_compiled() if q.device.type == "cuda" else _flex_unfused
    mask = block_mask(pattern, shape, causal=causal, device=q.device)
    from torch._dynamo import config

    with config.patch(recompile_limit=COMPILATIONS):
        return run(
            q,
            k,
            v,
            block_mask=mask,
            scale=scale,
            enable_gqa=shape.group > 1,
            kernel_options=FLEX_OPTIONS,
        )


def block_mask(pattern, shape: shapes.Shape, *, causal: bool, device):
    """FlexAttention's mask of a pattern, or None where every query sees every key.

    What `create_block_mask` makes, but in chunks: that holds all batch · heads · Tq · Tk entries.
    """
    shift = shapes.causal_shift(causal, shape.Tq, shape.Tk)
    if shift is not None:
        rows = patterns.causal(shift)
        pattern = patterns.both(pattern, rows) if pattern else rows
    if pattern is None:
        return None
    planes = shape.batch if pattern.per_batch else 1, shape.heads if pattern.per_head else 1
    patterns.check_planes(pattern, (shape.batch, shape.heads, shape.Tq, shape.Tk), device)
    key = *planes, shape.Tq, shape.Tk, torch.device(device)
    made = reads.kept(pattern).setdefault("block masks", OrderedDict())
    # Taken out and put back: the last one used is the last one in the order.
    found = made.pop(key, None)
    made[key] = _make_mask(pattern, *key) if found is None else found
    while len(made) > KEPT:
        made.popitem(last=False)
    return made[key]


@torch.inference_mode(False)  # or what is made could not be saved for a backward later
@torch.no_grad()
def _make_mask(pattern, batches, heads, Tq, Tk, device):
    rows, columns = -(-Tq // SIDE), -(-Tk // SIDE)
    key = torch.arange(Tk, device=device)
    counts = torch.zeros(batches, heads, rows, columns, dtype=torch.int32, device=device)
    step = max(1, CHUNK // (SIDE * SIDE * columns))
    for batch, head, first in product(range(batches), range(heads), range(0, rows, step)):
        last = min(first + step, rows)
        query = torch.arange(first * SIDE, min(last * SIDE, Tq), device=device)[:, None]
        plane = (torch.tensor(number, device=device) for number in (batch, head))
        seen = patterns.evaluate(pattern, *plane, query, key)
        padded = F.pad(seen, (0, columns * SIDE - Tk, 0, (last - first) * SIDE - len(query)))
        blocks = padded.view(last - first, SIDE, columns, SIDE)
        counts[batch, head, first:last] = blocks.sum(dim=(1, 3), dtype=torch.int32)
    full = counts == SIDE * SIDE
    return flex_attention.BlockMask.from_kv_blocks(
        *_lists((counts > 0) & ~full),
        *_lists(full),
        BLOCK_SIZE=SIDE,
        mask_mod=_asked_as_elsewhere(pattern),
        seq_lengths=(Tq, Tk),
    )


def _asked_as_elsewhere(pattern):
    """A mask_mod that knows the batch and head only where the pattern says that it differs."""
    batches, heads = int(pattern.per_batch), int(pattern.per_head)
    predicate = pattern.predicate  # not the pattern, which what is made of it must not keep
    if batches and heads:
        return predicate
    return lambda batch, head, query, key: predicate(batch * batches, head * heads, query, key)


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their columns, in order, first."""
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)


@functools.cache
def _flex_compiled():
    with warnings.catch_warnings():
        # PyTorch's compiler imports what PyTorch has deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
    # fullgraph: what cannot be compiled raises, and is not run unfused instead.
    return torch.compile(flex_attention.flex_attention, dynamic=False, fullgraph=True)


def _flex_unfused(*inputs, **options) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention.flex_attention(*inputs, **options)


def _sdpa(method, q, k, v, causal, pattern, scale) -> Tensor:
    shape = _checked(method, q, k, v, causal, pattern, scale)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    backend, can_run = SDPA[method.__name__]
    grouped = shape.group > 1
    run = functools.partial(
        F.scaled_dot_product_attention,
        *(q, k, v),
        is_causal=bool(causal),
        scale=scale,
        enable_gqa=grouped,
    )
    with sdpa_kernel(backend):
        # A compiler cannot trace the question; where the kernel cannot run, PyTorch then raises a
        # RuntimeError when it compiles.
        known = torch.compiler.is_compiling() or can_run(
            cuda.SDPAParams(q, k, v, None, 0.0, bool(causal), grouped)
        )
        if known:
            return run()
        reasons = _why_not(run)
    raise ValueError(
        f"{method.__name__} cannot run here: {reasons} (q {tuple(q.shape)}, k {tuple(k.shape)}, "
        f"{str(q.dtype).removeprefix('torch.')}); use another method"
    )


def _why_not(run) -> str:
    """What PyTorch says against the one kernel that is left to choose from.

    It must be asked by running: what `can_use_flash_attention(…, debug=True)` finds goes to stderr,
    and only what an operator finds goes through Python's warnings.
    """
    refusal = "PyTorch does not say why"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            run()
        except RuntimeError as error:
            refusal = str(error).strip().rstrip(".")
    texts = [str(each.message).split(" (Triggered")[0].strip().rstrip(".") for each in told]
    # The other kernels' reason is that they are disabled here.
    reasons = [x for x in texts if not x.endswith(("not used because:", "runtime disabled"))]
    return "; ".join(reasons) or refusal


def _checked(method, q, k, v, causal, pattern, scale) -> shapes.Shape:
    shape = shapes.check(q, k, v, pattern=pattern, scale=scale)
    shapes.causal_shift(causal, shape.Tq, shape.Tk)  # raises
    reason = method.unsupported(
        shape,
        dtype=q.dtype,
        device_type=q.device.type,
        causal=causal,
        pattern=pattern,
        scale=scale,
        backward=shapes.gradients_wanted(q, k, v),
    )
    if reason:
        raise ValueError(reason)
    return shape


def _sdpa_unsupported(name, most, shape, dtype, device_type, pattern) -> str | None:
    if device_type != "cuda":
        return f"{name} runs on CUDA only, not on {device_type}; use flash_torch or reference"
    reason = shapes.pattern_refused(name, pattern) or shapes.dtype_refused(
        name, dtype, shapes.HALVES
    )
    if reason is None and most < shape.D:
        return f"D = {shape.D}: {name} takes D <= {most} here; use reference or flash_torch"
    return reason or _empty(name, shape)


def _empty(name: str, shape) -> str | None:
    """Why sizes of 0 cannot be run, or None."""
    for size in ("batch", "heads", "Tq", "Tk"):
        if not getattr(shape, size):
            return f"{size} = 0: {name} needs at least 1; use flash_torch or reference"
    return None


def _top_left(name: str, causal, shape) -> str | None:
    """Why a causal mask that is not PyTorch's cannot be had, or None."""
    if causal == "bottom_right" and shape.Tq != shape.Tk:
        return (
            f"causal = 'bottom_right' with Tq = {shape.Tq}, Tk = {shape.Tk}: {name} counts from "
            "the first query and key; use flash_triton, block_sparse, flex or reference"
        )
    return None


def _flash_unsupported(
    shape, *, dtype, device_type, causal, pattern, scale, backward
) -> str | None:
    reason = _top_left("sdpa_flash", causal, shape)
    if reason:
        return reason
    if causal and shape.Tq != shape.Tk and device_type == "cuda":
        return (
            f"Tq = {shape.Tq}, Tk = {shape.Tk}: sdpa_flash is causal only where these are equal; "
            "use sdpa_cudnn or flash_torch"
        )
    return _sdpa_unsupported("sdpa_flash", 256, shape, dtype, device_type, pattern)


def _cudnn_unsupported(
    shape, *, dtype, device_type, causal, pattern, scale, backward
) -> str | None:
    # From cuDNN 9.22 some GPUs take more (PyTorch's sdp_utils.cpp); if this one does not, PyTorch
    # refuses when it is called.
    most = 256 if _cudnn_version() > 92200 else 128
    reason = _top_left("sdpa_cudnn", causal, shape)
    reason = reason or _sdpa_unsupported("sdpa_cudnn", most, shape, dtype, device_type, pattern)
    if reason is None and shape.D % 8:
        return f"D = {shape.D}: sdpa_cudnn takes multiples of 8; pad D with zeros and give scale"
    if reason is None and shape.Tk == 1:
        return "Tk = 1: sdpa_cudnn needs at least 2 keys; use sdpa_flash"
    return reason


@torch.compiler.assume_constant_result
def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0


def _flex_unsupported(shape, *, dtype, device_type, causal, pattern, scale, backward) -> str | None:
    if device_type not in ("cuda", "cpu"):
        return f"flex runs on cuda and cpu here, not on {device_type}; use reference"
    if device_type == "cpu" and backward:
        return "FlexAttention has no backward on the CPU; use flash_torch or reference there"
    if device_type == "cuda" and shape.D < 16:
        return f"D = {shape.D}: FlexAttention takes D >= 16; pad D with zeros and give scale"
    return shapes.dtype_refused("flex", dtype, shapes.PRECISE[:3]) or _empty("flex", shape)


SDPA = {
    "sdpa_flash": (SDPBackend.FLASH_ATTENTION, cuda.can_use_flash_attention),
    "sdpa_cudnn": (SDPBackend.CUDNN_ATTENTION, cuda.can_use_cudnn_attention),
}

sdpa_flash.unsupported = _flash_unsupported
sdpa_cudnn.unsupported = _cudnn_unsupported
flex.unsupported = _flex_unsupported
