"""What the ranks do in the tests of the linear methods; the tests only compare the answers."""

import torch

from blockshock import masks, sources
from blockshock.distributed import collectives
from blockshock.distributed.ranks import device
from blockshock.linear import METHODS
from blockshock.measure import clock
from blockshock.measure.errors import figure, relative_error

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def data(N, K, B, dtype, seed=0):
    """Weight, bias, input and upstream gradient on this rank's device."""
    shared = {"dtype": DTYPES[dtype], "device": device()}
    weight = sources.SeededWeight(N, K, **shared, seed=seed).rows(0, N)
    bias = sources.seeded_bias(N, **shared, seed=seed)
    generator = sources.generator(device(), "test", seed)
    x, dy = (torch.randn(B, n, generator=generator, device=device()) for n in (K, N))
    return weight, bias, x.to(DTYPES[dtype]), dy.to(DTYPES[dtype])


def errors(method, N, K, B, dtype, bias=True, lead=(), strided=False, break_it=None, **options):
    """Ratios to plain dense's error of Y, dX, dW, db on this rank, and whether all ranks agree."""
    weight, b, x, dy = data(N, K, B, dtype)
    x = x.t().contiguous().t() if strided else x
    b = b if bias else None
    layer = METHODS[method].from_dense(weight, b, **options)
    if break_it:
        break_it(layer)
    layer, x_in = layer, x.reshape(*lead, K) if lead else x
    x_in.requires_grad_()
    y = layer(x_in)
    assert y.shape == (*x_in.shape[:-1], N)
    y.backward(dy.reshape(y.shape))
    plain_weight = weight.clone().requires_grad_()
    plain_x = x.detach().clone().requires_grad_()
    plain = torch.nn.functional.linear(plain_x, plain_weight, b)
    plain.backward(dy)
    w64, x64, dy64 = weight.double(), x.detach().double(), dy.double()
    true = {
        "output": x64 @ w64.t() + (0 if b is None else b.double()),
        "grad_input": dy64 @ w64,
        "grad_weight": dy64.t() @ x64,
        "grad_bias": dy64.sum(0),
    }
    dense = {
        "output": plain.detach(),
        "grad_input": plain_x.grad,
        "grad_weight": plain_weight.grad,
        "grad_bias": dy.sum(0),
    }
    own = {"output": y.detach().reshape(B, N), "grad_input": x_in.grad.reshape(B, K)}
    own["grad_weight"], own["grad_bias"] = layer.weight.grad, b if b is None else layer.bias.grad
    ratios = {}
    for name, actual in own.items():
        if actual is None:
            continue
        yardstick = relative_error(dense[name], true[name])
        truth = true[name]
        if name == "grad_weight":
            truth = layer.restrict(sources.TensorWeight(truth))["weight"]
        found = figure(actual, truth, yardstick, ranks=collectives.group_size())
        ratios[name] = (found.ratio, found.passes)
    same = [collectives.same_on_all_ranks(own[name]) for name in ("output", "grad_input")]
    exact = torch.equal(layer.to_dense(), weight)
    return {"ratios": ratios, "same_bits": all(same), "exact_weight": exact}


def elsewhere(*args, **options):
    """`errors` of a layer on this rank's GPU, while another GPU is the current one."""
    with torch.cuda.device((device().index + 1) % torch.cuda.device_count()):
        return errors(*args, **options)


def check(answers):
    """Fails unless the `errors` of all ranks are small, and their results alike. For the parent."""
    for answer in answers:
        assert answer["exact_weight"]
        assert answer["same_bits"]
        assert all(passes for _, passes in answer["ratios"].values()), answer["ratios"]


def empty(method, N, K):
    """Shape of Y, of dX and the sum of |dW| for an input without rows."""
    weight, b, _, _ = data(N, K, 8, "bf16")
    layer = METHODS[method].from_dense(weight, b)
    x = weight.new_empty(2, 0, K).requires_grad_()
    y = layer(x)
    y.sum().backward()
    return tuple(y.shape), tuple(x.grad.shape), layer.weight.grad.abs().sum().item()


def repeated_bits(method, N, B, dtype):
    """Whether two forward and backward runs give the same bits."""
    weight, b, x, dy = data(N, N, B, dtype)
    runs = []
    for _ in range(2):
        layer = METHODS[method].from_dense(weight, b)
        x_in = x.detach().clone().requires_grad_()
        y = layer(x_in)
        y.backward(dy)
        runs.append((y.detach(), x_in.grad, layer.weight.grad))
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def second_derivative(method, **options):
    """The text of the error of a gradient of a gradient, or None."""
    weight, b, x, dy = data(64, 64, 8, "fp32")
    layer = METHODS[method].from_dense(weight, b, **options).requires_grad_(False)
    x.requires_grad_()
    (dx,) = torch.autograd.grad((layer(x).square() * dy).sum(), x, create_graph=True)
    try:
        dx.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return None


def goes_on_after_a_failure(where, N=256, B=32, **options):
    """Whether Y and dX are right after the weight gradient (or a product) failed once."""
    weight, b, x, dy = data(N, N, B, "bf16" if device().type == "cuda" else "fp32")
    layer = METHODS["dense_tp_row"].from_dense(weight, b, **options)
    expected = run_once(layer, x, dy)
    calls, whole = [], getattr(layer, where)

    def fail(*args):
        calls.append(args)
        if len(calls) == (2 if where == "product" else 1):
            raise torch.OutOfMemoryError("made up")
        return whole(*args)

    setattr(layer, where, fail)
    for _ in range(2):  # the second time is right again
        try:
            found = run_once(layer, x, dy)
        except torch.OutOfMemoryError:
            found = None
    if found is None:
        return False
    return all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def run_once(layer, x, dy):
    """Y and dX."""
    x_in = x.detach().clone().requires_grad_()
    y = layer(x_in)
    y.backward(dy)
    return y.detach(), x_in.grad


def flip_one_mask_group(layer):
    """One group of four keeps another place than the weight was packed for."""
    if layer_is_second():
        return
    codes = layer.codes.clone()
    codes[0, 0] = masks.complement(codes[:1, :1])[0, 0]
    layer.codes.copy_(codes)


def drop_a_term(layer):
    """Rank 1's term is lost."""
    if layer_is_second():
        with torch.no_grad():
            layer.weight.zero_()


def layer_is_second():
    """Whether this is rank 1."""
    return collectives.group_rank() == 1


def refusal(method, N, K, dtype, poison=None, **options):
    """The text of the ValueError that from_dense raises."""
    weight, b, *_ = data(N, K, 8, dtype)
    if poison is not None:
        weight[poison] = float("nan")
    try:
        METHODS[method].from_dense(weight, b, **options)
    except ValueError as error:
        return str(error)
    return None


def train(method, steps, optimizer, fused, dtype, size, **options):
    """How far the weight's change in some training steps, and dX after them, are from dense's.

    Beside float32 master values stands a float32 layer: what a bf16 one loses in each step is more
    than the limits.
    """
    weight, b, x, dy = data(size, size, 32, dtype)
    wide = torch.float32 if options.get("master") == "float32" else weight.dtype
    own = METHODS[method].from_dense(weight, b, **options)
    dense = METHODS["dense_single"].from_dense(weight.to(wide), b.to(wide))
    for layer, kind in ((own, x.dtype), (dense, wide)):
        step = getattr(torch.optim, optimizer)(layer.parameters(), lr=0.01, fused=fused)
        for _ in range(steps):
            step.zero_grad()
            x_in = x.to(kind, copy=True).requires_grad_()
            (layer(x_in) - dy.to(kind)).square().mean().backward()
            step.step()
        layer(x_in).backward(dy.to(kind))  # dX by the transposed form after the last step
        layer.dx = x_in.grad
    whole = weight.to(wide), dense.weight.detach()
    start, end = (own.restrict(sources.TensorWeight(w))["weight"] for w in whole)
    multiplied = own.restrict(sources.TensorWeight(own.to_dense()))["weight"]
    assert torch.equal(multiplied, own.weight.to(own.to_dense().dtype).to(multiplied.dtype))
    return {
        "weight": relative_error(own.weight.detach() - start, end - start),
        "dx": relative_error(own.dx, dense.dx),
    }


def small_steps(steps=64, share=2**-10, size=256, **options):
    """By what factor the products, forward and backward, grew over steps of a share of the weight;
    None where they disagree. Weights are powers of two, so that bf16 has them and the sum exactly.
    """
    weight, _, x, _ = data(size, size, 32, "bf16")
    weight = weight.sign().mul(2.0 ** torch.arange(-4, 4, device=device()).repeat(size // 8))
    layer = METHODS["block_shock"].from_dense(weight.bfloat16(), **options)
    start, step = layer.weight.detach().clone(), torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(steps):
        layer.weight.grad = start * -share
        step.step()
        layer(x)
    whole, x_in = layer.to_dense(), x.clone().requires_grad_()
    y = layer(x_in)
    y.backward(x)
    factor = (whole / weight).unique().tolist()
    same = relative_error(y, x.double() @ whole.double().t()) < 0.01
    same &= relative_error(x_in.grad, x.double() @ whole.double()) < 0.01
    return {"factor": factor[0] if len(factor) == 1 and same else None, "dtype": str(y.dtype)}


def paths(method, N, B, dtype, **options):
    """What a layer says of itself after a step with B rows."""
    weight, b, x, dy = data(N, N, B, dtype)
    layer = METHODS[method].from_dense(weight, b, **options)
    layer(x.requires_grad_()).backward(dy)
    return layer.paths(B) if hasattr(layer, "paths") else {}


def captured(method, N, B, dtype, **options):
    """How far replays of a captured step with other inputs are from the same step run eagerly."""
    weight, b, x, dy = data(N, N, B, dtype)
    layer, results = METHODS[method].from_dense(weight, b, **options), {}
    x.requires_grad_()

    def step():
        y = layer(x)
        dx, dw, db = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
        results.update(output=y.detach(), grad_input=dx, grad_weight=dw, grad_bias=db)

    graph = clock.capture(step)
    static, largest = dict(results), 0.0
    for seed in (1, 2, 3):
        *_, new_x, new_dy = data(N, N, B, dtype, seed=seed)
        with torch.no_grad():
            x.copy_(new_x)
            dy.copy_(new_dy)
        for tensor in static.values():
            tensor.fill_(torch.nan)
        graph.replay()
        found = {name: tensor.clone() for name, tensor in static.items()}
        step()
        worst = max(relative_error(found[name], results[name]) for name in found)
        largest = max(largest, worst) if worst == worst else worst
    return largest
