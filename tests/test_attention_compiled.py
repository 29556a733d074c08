"""Attention inside `torch.compile`: the same bits, whole graphs, and lists that are made once."""

import gc

import pytest
import torch

from blockshock.attention import METHODS, FlashAttentionTriton, blocks, patterns
from tests.attention_checks import DEVICE, check_plain, problem, results

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
T = 40
ROW, COLUMN = torch.arange(T, device=DEVICE)[:, None], torch.arange(T, device=DEVICE)


class Block(torch.nn.Module):
    """A transformer's attention, with a residual."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.qkv, self.out = torch.nn.Linear(32, 64), torch.nn.Linear(32, 32)

    def forward(self, x):  # [B, T, 32], two heads of q share one of k and v
        q, k, v = self.qkv(x).split((32, 16, 16), dim=-1)
        q, k, v = (y.unflatten(-1, (-1, 16)).transpose(1, 2) for y in (q, k, v))
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


ATTENDS = {
    "flash_triton": lambda q, k, v: METHODS["flash_triton"](q, k, v, causal=True),
    "bottom right": lambda q, k, v: METHODS["flash_triton"](
        q, k[:, :, 3:], v[:, :, 3:], causal="bottom_right"
    ),
    "function": lambda q, k, v: FlashAttentionTriton.apply(q, k, v, True, 0.2),
    "block_sparse": lambda q, k, v: METHODS["block_sparse"](q, k, v, causal=True),
    "pattern": lambda q, k, v: METHODS["block_sparse"](q, k, v, pattern=patterns.band(5)),
    "unpruned": lambda q, k, v: METHODS["block_sparse_unpruned"](q, k, v, causal=True),
    "dropout": lambda q, k, v: METHODS["block_sparse"](q, k, v, causal=True, dropout=0.3, seed=5),
}


# "aot_eager" traces the backward as well; "eager" differs from it in no method's own code.
@pytest.mark.parametrize(
    ("name", "backend"),
    [*[(name, "aot_eager") for name in ATTENDS], ("function", "eager"), ("pattern", "eager")],
)
def test_a_block_compiles_whole_into_the_same_bits(name, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(ATTENDS[name]).to(DEVICE)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for tokens in (40, 33, 17):  # other lengths as well
        x = torch.randn(1, tokens, 32, device=DEVICE, requires_grad=True)
        inputs = x, *block.parameters()
        found, true = (
            (out := run(x), *torch.autograd.grad(out.square().sum(), inputs))
            for run in (compiled, block)
        )
        for own, exact in zip(found, true, strict=True):
            torch.testing.assert_close(own, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.gpus(1)
@pytest.mark.parametrize("method", ["sdpa_flash", "sdpa_cudnn"])
def test_a_kernel_of_pytorch_compiles_whole(method):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(lambda *qkv: METHODS[method](*qkv, causal=True)).to(DEVICE, torch.bfloat16)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for tokens in (40, 33):
        x = torch.randn(2, tokens, 32, device=DEVICE, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=0)


BUILT = {
    "band": lambda: patterns.band(7),
    "causal, shifted": lambda: patterns.causal(shift=3),
    "random_blocks": lambda: patterns.random_blocks(8, 0.5, per_head=True),
    "documents": lambda: patterns.documents([13, 27]),
    "both": lambda: patterns.both(patterns.band(9), patterns.strided(4)),
}


@pytest.mark.parametrize("name", BUILT)
def test_a_builder_inside_a_compiled_function_makes_its_lists_once(name, monkeypatch):
    torch._dynamo.reset()
    built, build = [], blocks._build
    monkeypatch.setattr(blocks, "_build", lambda *a: built.append(a) or build(*a))
    given = problem(1, 2, 1, T, T, 16)

    def attend(q, k, v):
        return METHODS["block_sparse"](q * 1, k, v, pattern=BUILT[name]()) * 1

    compiled = torch.compile(attend, backend="eager")
    runs = [compiled(*given[:3]) for _ in range(4)]
    assert len(built) <= 1
    assert all(torch.equal(run, attend(*given[:3])) for run in runs)


@pytest.mark.parametrize("name", ["reference", "block_sparse"])
def test_a_compiled_function_follows_a_rule_that_changes(name):
    torch._dynamo.reset()
    mask = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril()
    ids = torch.arange(T, device=DEVICE) // 25
    of_mask = patterns.from_mask(mask)
    of_ids = patterns.predicate(lambda b, h, i, j: ids[i] == ids[j])
    compiled = torch.compile(METHODS[name], backend="eager")
    given = problem(1, 2, 1, T, T, 16)
    for _ in range(2):
        for pattern, seen in ((of_mask, mask), (of_ids, ids[:, None] == ids)):
            check_plain(compiled, given, seen, pattern=pattern)
        mask.copy_(mask.mT.clone())
        ids.copy_(torch.arange(T) // 16)


def test_patterns_made_of_tensors_inside_a_compiled_function_are_right():
    torch._dynamo.reset()
    given = problem(1, 2, 1, T, T, 16)

    def attend(q, k, v, mask):
        of_mask = METHODS["block_sparse"](q, k, v, pattern=patterns.from_mask(mask))
        near = patterns.predicate(lambda b, h, i, j: (i - j).abs() <= 4)
        return of_mask + METHODS["block_sparse"](q, k, v, pattern=near)

    compiled = torch.compile(attend, backend="eager")
    for shift in (0, 5):
        mask = ROW + shift >= COLUMN
        assert torch.equal(compiled(*given[:3], mask), attend(*given[:3], mask))


def test_gradients_that_nobody_wants_are_none_in_a_compiled_function():
    torch._dynamo.reset()
    compiled = torch.compile(METHODS["flash_triton"], backend="aot_eager", fullgraph=True)
    q, k, v, d_out = problem(1, 2, 1, T, T, 16)
    true = results(METHODS["flash_triton"], q, k, v, d_out)
    inputs = [x.detach().requires_grad_(x is not k and x is not v) for x in (q, k, v)]
    compiled(*inputs).backward(d_out)
    assert torch.equal(inputs[0].grad, true[1])
    assert inputs[1].grad is inputs[2].grad is None


def test_the_operators_pass_the_checks_of_pytorch():
    from blockshock.attention import operators

    q, k, v, d_out = problem(2, 4, 2, 20, 30, 16)
    out, lse = operators.forward(q, k, v, scale=0.25, shift=None)
    utilities = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    for shift in (None, 10):
        torch.library.opcheck(
            operators.forward, (q, k, v), {"scale": 0.25, "shift": shift}, test_utils=utilities
        )
        torch.library.opcheck(
            operators._backward,
            (q, k, v, out, lse, d_out),
            {"scale": 0.25, "shift": shift, "of_q": True, "of_k": shift is None},
            test_utils=utilities,
        )


def test_the_pattern_of_a_builder_lives_as_long_as_the_graph_that_names_it():
    torch._dynamo.reset()
    given = problem(1, 1, 1, T, T, 16)[:3]
    compiled = torch.compile(
        lambda q, k, v: METHODS["block_sparse"](q, k, v, pattern=patterns.causal_band(11)),
        backend="aot_eager",
        fullgraph=True,
    )
    first = compiled(*given)
    for window in range(100, 101 + patterns.KEPT):
        patterns.causal_band(window)  # the builder forgets the first
    gc.collect()
    assert torch.equal(compiled(*given), first)


def test_a_rule_that_changes_before_the_backward_of_a_compiled_function_is_refused():
    torch._dynamo.reset()
    mask = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril()
    pattern = patterns.from_mask(mask)
    compiled = torch.compile(METHODS["block_sparse"], backend="aot_eager", fullgraph=True)
    given = problem(1, 1, 1, T, T, 16)
    out = compiled(*(x.detach().requires_grad_() for x in given[:3]), pattern=pattern)
    mask[3].zero_()
    METHODS["block_sparse"](*given[:3], pattern=pattern)
    with pytest.raises(RuntimeError, match="lists of this compiled attention are gone"):
        out.backward(given[3])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_seed_that_a_compiled_function_advances_drops_what_eager_drops(backend):
    torch._dynamo.reset()
    given = problem(1, 2, 1, T, T, 16)

    def step(q, k, v, place):
        place.add_(1)
        return METHODS["block_sparse"](q, k, v, causal=True, dropout=0.4, seed=place)

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    places = [torch.tensor([7], device=DEVICE) for _ in range(2)]
    for _ in range(3):
        found = results(lambda *x: compiled(*x, places[0]), *given)
        true = results(lambda *x: step(*x, places[1]), *given)
        assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))
