"""What ranks run for tests/test_hybrid.py; the tests judge the answers."""

import torch
import torch.distributed as dist
from torch import nn

from blockshock.attention import patterns
from blockshock.distributed import collectives
from blockshock.distributed.ranks import device
from blockshock.measure.errors import figure, relative_error
from blockshock.measure.regions import Recorder, recording
from blockshock.transformer import HybridBlock, compile_model, dense_reference

WIDTH, HEADS, B = 128, 8, 2
T = 77  # no multiple of a tile
FLOAT32_ERROR = 1e-5  # that passes: sums in another order


def place():
    """The rank's device; the CPU in a process that is no rank."""
    return device() if dist.is_initialized() else torch.device("cpu")


def of_heads(tokens):
    """A mask of its own for each head: head h sees keys at most 3 h away, and key 5."""
    apart = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
    mask = apart <= 3 * torch.arange(HEADS).view(-1, 1, 1)
    mask[..., 5] = True
    return patterns.from_mask(mask)


PATTERNS = {
    "none": lambda tokens: None,
    "window": lambda tokens: patterns.band(20),
    "causal_window": lambda tokens: patterns.causal_band(20),
    "blocks": lambda tokens: patterns.random_blocks(16, 0.4),
    "blocks_per_head": lambda tokens: patterns.random_blocks(16, 0.4, per_head=True),
    "mask_per_head": of_heads,
    "rule_per_head": lambda tokens: patterns.predicate(
        lambda b, h, i, j: (i - j) % (h + 1) == 0, "strides", per_head=True
    ),
}


def made(pattern="none", *, dtype=torch.float32, tokens=T, **options):
    generator = torch.Generator().manual_seed(0)
    block = HybridBlock(
        WIDTH, HEADS, pattern=PATTERNS[pattern](tokens), generator=generator, device=place(),
        dtype=dtype, **options,
    )  # fmt: skip
    # Weights for which each half changes the stream, and scales that are not 1.
    state = block.full_state_dict()
    for name, value in state.items():
        drawn = torch.Generator().manual_seed(len(name))
        noise = torch.randn(value.shape, generator=drawn).to(value)
        state[name] = value + 0.3 * noise if "norm" in name else 6 * value
    block.load_full_state_dict(state)
    return block


def data(dtype, tokens=T):
    """x and the gradient of the result, the same on all ranks."""
    drawn = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, B, tokens, WIDTH, generator=drawn).to(place(), dtype).unbind()
    return x.requires_grad_(), dy


def reference(block, x, dy, dtype, pattern, causal):
    """Result, gradient of x and of each whole weight, by name, of one process in a dtype."""
    weights = {n: w.to(dtype).requires_grad_() for n, w in block.full_state_dict().items()}
    x = x.detach().to(dtype).requires_grad_()
    y = dense_reference(x, weights, HEADS, pattern=pattern, causal=causal)
    y.backward(dy.to(dtype))
    return {"output": y.detach(), "x": x.grad, **{n: w.grad for n, w in weights.items()}}


def found(block, x, dy):
    """The same of a block."""
    y = block(x)
    y.backward(dy)
    return {"output": y.detach(), "x": x.grad, **block.gather_gradients()}


def against_dense(pattern, causal, *, dtype=torch.float32, tokens=T, spoil=None, **options):
    """(error figures by name, whether ranks have the same bits, sums forward, sums backward)."""
    block = made(pattern, dtype=dtype, tokens=tokens, causal=causal, **options)
    x, dy = data(dtype, tokens)
    if spoil:
        spoil(block)
    recorder, sums = Recorder(place().type), []
    with recording(recorder):
        y = block(x)
        recorder.collect()
        sums.append(recorder.counts.get("allreduce", (0, 0))[0])
        y.backward(dy)
        recorder.collect()
        sums.append(recorder.counts.get("allreduce", (0, 0))[0])
    answers = {"output": y.detach(), "x": x.grad, **block.gather_gradients()}
    same = all(collectives.same_on_all_ranks(answer) for answer in answers.values())
    mask = PATTERNS[pattern](tokens), causal
    truths, plain = (reference(block, x, dy, d, *mask) for d in (torch.float64, dtype))
    assert truths.keys() == answers.keys()
    limits = {
        "ranks": collectives.group_size(),
        "enough": FLOAT32_ERROR if dtype == torch.float32 else 0.0,
    }
    figures = {
        name: figure(answers[name], truth, relative_error(plain[name], truth), **limits)
        for name, truth in truths.items()
    }
    return figures, same, *sums


def every_pattern(dtype=torch.float32, names=tuple(PATTERNS)):
    """`against_dense` of each pattern, causal and not."""
    return {
        (pattern, causal): against_dense(pattern, causal, dtype=dtype)
        for pattern in names
        for causal in (True, False)
    }


def spoiled(kind):
    """`against_dense` of a block with a fault."""

    def every_rank_has_the_heads_of_the_first(block):
        block.pattern = patterns.random_blocks(16, 0.4, per_head=True)

    def a_gradient_is_not_summed(block):
        block.sums.enter = lambda x: x

    def a_part_is_not_summed(block):
        block.sums.leave = lambda x: x

    faults = {
        "heads": every_rank_has_the_heads_of_the_first,
        "gradient": a_gradient_is_not_summed,
        "part": a_part_is_not_summed,
        "none": None,
    }
    return against_dense("blocks_per_head", True, spoil=faults[kind])


def weights():
    """The whole weights of a new block, and whether one in which they are loaded is the same."""
    block, other = made("window"), made("window")
    state = block.full_state_dict()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
        other.load_full_state_dict(state)
        x, _ = data(torch.float32)
        return {n: w.cpu() for n, w in state.items()}, torch.equal(block(x), other(x))


def clipped():
    """The norm of all gradients as PyTorch clips them, and that of the dense block's."""
    block, (x, dy) = made("window"), data(torch.float32)
    found(block, x, dy)
    own = nn.utils.clip_grad_norm_(block.parameters(), 1e9)
    dense = reference(block, x, dy, torch.float32, PATTERNS["window"](T), True)
    norms = [g.norm() for name, g in dense.items() if name.endswith("weight")]
    return float(own), float(torch.stack(norms).norm())


def compiled():
    """By name the difference that compiling makes."""
    x, dy = data(torch.float32)
    want = found(made("blocks_per_head"), x, dy)
    x.grad = None
    got = found(compile_model(made("blocks_per_head"), backend="aot_eager"), x, dy)
    return {name: relative_error(got[name], want[name]) for name in want}


def another_x():
    """What is said where each rank has its own x, in training and in eval."""
    block, said = made(), []
    x = torch.randn(1, T, WIDTH, generator=torch.Generator().manual_seed(collectives.group_rank()))
    for training in (True, False):
        try:
            block.train(training)(x.to(place()))
        except ValueError as error:
            said.append(str(error))
    assert len(said) == 2, said
    return said


def refused(seeds=False, windows=False, **options):
    """What making a block says. seeds, windows: each rank has its own."""
    rank = collectives.group_rank()
    if seeds:
        options["generator"] = torch.Generator().manual_seed(rank)
    if windows:
        options["pattern"] = patterns.band(20 + rank)
    try:
        HybridBlock(**{"width": WIDTH, "heads": HEADS, **options})
    except ValueError as error:
        return str(error)
