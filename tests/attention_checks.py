"""What the tests of the attention kernels share: problems, and errors against float64."""

import torch

from blockshock.attention import METHODS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies the bits of bf16 as integers.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
NAMES = ("out", "dq", "dk", "dv")


def problem(batch, heads, kv_heads, Tq, Tk, D, dtype=torch.float32, seed=0):
    """q, k, v and the gradient of out, normal."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, Tq), (kv_heads, Tk), (kv_heads, Tk), (heads, Tq))
    made = (torch.randn(batch, h, t, D, generator=generator) for h, t in sizes)
    return tuple(x.to(DEVICE, dtype) for x in made)


def results(method, q, k, v, d_out, **options):
    """out, dq, dk, dv."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = method(*inputs, **options)
    return (out.detach(), *torch.autograd.grad(out, inputs, d_out))


def truth(q, k, v, d_out, **options):
    """The same by `reference` in float64."""
    return results(METHODS["reference"], *(x.double() for x in (q, k, v, d_out)), **options)


def relative(found, true):
    """Frobenius; of a true zero (up to float64's rounding) the found norm."""
    found, true = found.detach().double(), true.detach()
    return float((found - true).norm() / (true.norm() if true.norm() > 1e-9 else 1))


def _terms(q, k, v, d_out, scale):
    """How large the terms that dQ and dK sum may be."""
    q, k, v, d_out = (float(x.double().norm()) for x in (q, k, v, d_out))
    return scale * d_out * v * max(q, k)


def check(method, given, **options):
    """fp32 within 1e-5, halves within 1.5 times the error of `reference` in the same dtype."""
    true, found = truth(*given, **options), results(method, *given, **options)
    plain = results(METHODS["reference"], *given, **options)
    entries = min(x.numel() for x in given)
    slack = 1 + 3 * max(entries, 1) ** -0.5  # chance has a part in few entries
    for name, own, yardstick, exact in zip(NAMES, found, plain, true, strict=True):
        assert own.dtype == given[0].dtype
        error = relative(own, exact)
        limit = 1.5 * slack * relative(yardstick, exact)
        if given[0].dtype == torch.float32:
            limit = max(limit, 1e-5)
        if exact.norm() <= 1e-9:  # zero in theory (of one key): rounding of the terms it is made of
            scale = options.get("scale") or given[0].shape[3] ** -0.5
            limit = max(limit, 1e-5, 1e-7 * _terms(*given, scale))
        assert error <= limit, f"{name}: {error:.2e} of at most {limit:.2e}"


def plain(q, k, v, seen):
    """softmax(D^−½ Q Kᵀ) V over the pairs seen (they broadcast); rows without any are zero."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty | ~seen, 0) @ v


def check_plain(name, given, seen, limit=2e-5, **options):
    """A method, or its name, against `plain` in float64; flex has no backward on the CPU."""
    method = METHODS.get(name, name)
    true = results(lambda *x: plain(*x, seen), *(x.double() for x in given))
    if name == "flex" and DEVICE == "cpu":
        found = (method(*given[:3], **options),)
    else:
        found = results(method, *given, **options)
    for what, own, exact in zip(NAMES, found, true, strict=False):
        assert relative(own, exact) < limit, (name, what)
