"""Uses that would give wrong numbers without a word: each gives the right ones, or one clear error.

Every method is compared with plain float64, forward and, where it has one, backward.
"""

import functools
import types

import pytest
import torch

from blockshock.attention import METHODS, patterns, reads, rules
from blockshock.kernels.dropout import Dropout, kept_reference
from tests.attention_checks import DEVICE, check_plain, plain, problem, relative, results

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
WITH_PATTERNS = ("reference", "flex", "block_sparse", "block_sparse_unpruned")
T = 40
ROW, COLUMN = torch.arange(T, device=DEVICE)[:, None], torch.arange(T, device=DEVICE)
PAIRS = 0, 0, ROW, COLUMN  # all of a batch entry's head


class Window:
    size = 3

    def __call__(self, b, h, i, j):
        return (i - j).abs() <= self.size


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.settings = types.SimpleNamespace(window=3)
        self.register_buffer("ids", torch.arange(T, device=DEVICE) // 25)

    def rule(self, b, h, i, j):
        return (self.ids[i] == self.ids[j]) & ((i - j).abs() <= self.settings.window)


LIMIT = 4


def by_global(b, h, i, j):
    return (i - j).abs() <= LIMIT


def changing(kind):
    """A pattern, what it reads, and a change of that: pattern, change, mask."""
    ids = torch.arange(T, device=DEVICE) // 25
    later = torch.arange(T, device=DEVICE) // 16
    same_id = lambda b, h, i, j: ids[i] == ids[j]  # noqa: E731
    if kind == "a tensor written in place":
        return patterns.predicate(same_id), lambda: ids.copy_(later), lambda: same_id(*PAIRS)
    if kind == "a tensor replaced":
        held = types.SimpleNamespace(ids=ids)
        rule = lambda b, h, i, j: held.ids[i] == held.ids[j]  # noqa: E731
        change = lambda: setattr(held, "ids", later)  # noqa: E731
        return patterns.predicate(rule), change, lambda: rule(*PAIRS)
    if kind == "a mask written in place":
        mask = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril()
        return patterns.from_mask(mask), lambda: mask.copy_(mask.mT.clone()), lambda: mask
    if kind == "a joined mask":
        mask = torch.ones(T, T, dtype=torch.bool, device=DEVICE)
        joined = patterns.both(patterns.from_mask(mask), patterns.causal())
        return joined, lambda: mask[:, 9].zero_(), lambda: mask & (COLUMN <= ROW)
    if kind == "a callable's attribute":
        rule = Window()
        return (
            patterns.predicate(rule, "window"),
            lambda: setattr(rule, "size", 30),
            lambda: rule(*PAIRS),
        )
    if kind == "a module's setting":
        layer = Layer()
        change = lambda: setattr(layer.settings, "window", 30)  # noqa: E731
        return patterns.predicate(layer.rule), change, lambda: layer.rule(*PAIRS)
    if kind == "a module's buffer":
        layer = Layer()
        layer.settings.window = 40
        change = lambda: layer.ids.copy_(later)  # noqa: E731
        return patterns.predicate(layer.rule), change, lambda: layer.rule(*PAIRS)
    if kind == "a variable of the closure":
        window = 3

        def rule(b, h, i, j):
            return (i - j).abs() <= window

        def change():
            nonlocal window
            window = 30

        return patterns.predicate(rule), change, lambda: rule(*PAIRS)
    if kind == "a global":
        change = lambda: globals().update(LIMIT=40)  # noqa: E731
        return patterns.predicate(by_global), change, lambda: by_global(*PAIRS)
    if kind == "a partial's list":
        windows = [3]

        def rule(windows, b, h, i, j):
            return (i - j).abs() <= windows[0]

        bound = functools.partial(rule, windows)
        change = lambda: windows.__setitem__(0, 30)  # noqa: E731
        return patterns.predicate(bound), change, lambda: bound(*PAIRS)
    assert kind == "what cannot be noticed, renewed"
    array = torch.full((1,), 3).numpy()
    rule = lambda b, h, i, j: (i - j).abs() <= int(array[0])  # noqa: E731
    pattern = patterns.predicate(rule)

    def write():
        array[0] = 30
        pattern.renew()

    return pattern, write, lambda: rule(*PAIRS)


KINDS = (
    "a tensor written in place",
    "a tensor replaced",
    "a mask written in place",
    "a joined mask",
    "a callable's attribute",
    "a module's setting",
    "a module's buffer",
    "a variable of the closure",
    "a global",
    "a partial's list",
    "what cannot be noticed, renewed",
)


# The ablation makes its lists as block_sparse does, so a kind of each way to read is enough.
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *[(kind, name) for kind in KINDS for name in WITH_PATTERNS[:3]],
        ("a mask written in place", "block_sparse_unpruned"),
        ("a callable's attribute", "block_sparse_unpruned"),
        ("what cannot be noticed, renewed", "block_sparse_unpruned"),
    ],
)
def test_a_rule_that_changes_is_asked_again(kind, name, monkeypatch):
    monkeypatch.setitem(globals(), "LIMIT", 4)
    given = problem(1, 2, 1, T, T, 16)
    pattern, change, mask = changing(kind)
    before = mask().clone()
    check_plain(name, given, before, pattern=pattern)
    change()
    assert not torch.equal(mask(), before)
    check_plain(name, given, mask(), pattern=pattern)
    made = dict(reads.kept(pattern))
    check_plain(name, given, mask(), pattern=pattern)
    assert reads.kept(pattern) == made  # and not asked again while nothing changes


def test_renewing_a_part_renews_what_it_was_joined_into():
    part = patterns.predicate(lambda b, h, i, j: i >= j)
    joined, other = patterns.both(part, patterns.band(3)), patterns.band(3)
    for pattern in (joined, other):
        reads.kept(pattern)["lists"] = 1
    part.renew()
    assert not reads.kept(joined)
    assert reads.kept(other)


def test_a_gradient_is_that_of_the_forward_whose_rule_has_changed_since():
    given = problem(1, 1, 1, T, T, 16)
    pattern, change, mask = changing("a mask written in place")
    seen = mask().clone()
    true = results(lambda *x: plain(*x, seen), *(x.double() for x in given))
    inputs = [x.detach().requires_grad_() for x in given[:3]]
    out = METHODS["block_sparse"](*inputs, pattern=pattern)
    change()
    METHODS["block_sparse"](*given[:3], pattern=pattern)
    for own, exact in zip(torch.autograd.grad(out, inputs, given[3]), true[1:], strict=True):
        assert relative(own, exact) < 2e-5


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_of_inference_mode_is_never_taken_for_known(inference):
    given = problem(1, 1, 1, T, T, 16)
    with torch.inference_mode(inference):
        mask = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril()
        pattern = patterns.from_mask(mask)
        METHODS["block_sparse"](*given[:3], pattern=pattern)
        mask.copy_(mask.mT.clone())
    for name in ("reference", "block_sparse"):  # and what was made in inference mode trains
        check_plain(name, given, mask, pattern=pattern)


@pytest.mark.parametrize("name", WITH_PATTERNS)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("join", [None, patterns.both])
def test_a_rule_that_writes_to_its_arguments_is_refused(name, inference, join):
    def rule(b, h, i, j):
        i -= 5
        return i >= j

    pattern = patterns.predicate(rule, "writes")
    pattern = join(pattern, patterns.band(9)) if join else pattern
    given = problem(1, 1, 1, T, T, 16)[:3]
    with torch.inference_mode(inference), pytest.raises(ValueError, match=r"writes.*(i - 5|infer)"):
        METHODS[name](*given, pattern=pattern)


DIFFERENT = {
    "batch": lambda b, h, i, j: j < 40 - 11 * b,
    "last batch": lambda b, h, i, j: (b < 2) | (i >= j),
    "batch by value": lambda b, h, i, j: (i >= j) if b > 0 else (i <= j),
    "head": lambda b, h, i, j: (i - j).abs() <= 2 << h,
    "last head": lambda b, h, i, j: (h < 3) | (i >= j),
    "both": lambda b, h, i, j: (b + h < 5) | (i >= j),
}


@pytest.mark.parametrize("name", WITH_PATTERNS)
@pytest.mark.parametrize("what", DIFFERENT)
def test_a_rule_that_differs_between_batches_or_heads_says_so(what, name):
    given = problem(3, 4, 1, T, T, 16)
    silent = patterns.predicate(DIFFERENT[what], "mine")
    method = METHODS[name]
    if what != "batch by value" or name != "flex":  # FlexAttention takes no such rule
        method(*(x[:1, :1] for x in given[:3]), pattern=silent)
    with pytest.raises(ValueError, match=r"'mine' answers by its (batch|head).*per_(batch|head)=T"):
        method(*given[:3], pattern=silent)
    if what == "batch by value" or name == "flex":
        return
    said = patterns.predicate(DIFFERENT[what], "mine", per_batch=True, per_head=True)
    b, h = torch.arange(3, device=DEVICE).view(-1, 1, 1, 1), torch.arange(4, device=DEVICE)
    seen = DIFFERENT[what](b, h.view(-1, 1, 1), ROW, COLUMN).expand(3, 4, T, T)
    check_plain(name, given, seen, pattern=said)


def test_a_rule_may_read_batch_and_head_without_differing():
    from torch.nn.attention.flex_attention import and_masks

    causal, near = (lambda b, h, i, j: i >= j), (lambda b, h, i, j: i - j <= 9)
    pattern = patterns.predicate(and_masks(causal, near))
    seen = (ROW >= COLUMN) & (ROW - COLUMN <= 9)
    for name in WITH_PATTERNS:
        check_plain(name, problem(2, 2, 1, T, T, 16), seen, pattern=pattern)


def dropped(given, rate, seed):
    """out, dq, dk, dv of a causal attention with the weights dropped that the seed drops."""
    B, H, T = given[0].shape[:3]
    factors = kept_reference(Dropout(rate, seed), B, H, T, T, DEVICE) / (1 - rate)

    def method(q, k, v):
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(COLUMN > ROW, -torch.inf)
        return scores.softmax(-1) * factors @ v

    return results(method, *(x.double() for x in given))


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 7])
def test_a_seed_in_a_tensor_drops_what_the_number_drops_also_when_it_is_advanced(seed):
    given = problem(1, 2, 2, T, T, 16)
    place = torch.tensor([seed], device=DEVICE)
    for step in range(2):
        inputs = [x.detach().requires_grad_() for x in given[:3]]
        out = METHODS["block_sparse"](*inputs, causal=True, dropout=0.4, seed=place)
        place.add_(1)  # before the backward
        found = out, *torch.autograd.grad(out, inputs, given[3])
        for own, exact in zip(found, dropped(given, 0.4, seed + step), strict=True):
            assert relative(own, exact) < 2e-5


def test_a_seed_that_is_none_is_refused():
    given = problem(1, 1, 1, T, T, 16)[:3]
    for seed, message in (
        (torch.zeros(2, dtype=torch.int64), "an int64 tensor of one element"),
        (torch.zeros(1), r"seed of torch.float32 \(1,\)"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), "seed on meta, q on"),
    ):
        with pytest.raises(ValueError, match=message):
            METHODS["block_sparse"](*given, dropout=0.5, seed=seed)


def test_dropout_by_a_number_is_refused_in_a_capture(monkeypatch):
    given = problem(1, 1, 1, T, T, 16)[:3]
    pattern = patterns.band(3)
    METHODS["block_sparse"](*given, pattern=pattern)
    monkeypatch.setattr(rules, "captured", lambda device: True)
    METHODS["block_sparse"](*given, pattern=pattern, seed=3)  # nothing is dropped
    place = torch.tensor(3, device=DEVICE)
    METHODS["block_sparse"](*given, pattern=pattern, dropout=0.5, seed=place)
    with pytest.raises(RuntimeError, match=r"seed = 3 is a number.*seed.add_"):
        METHODS["block_sparse"](*given, pattern=pattern, dropout=0.5, seed=3)


@pytest.mark.gpus(1)
def test_each_replay_of_a_graph_drops_other_weights():
    given = problem(1, 2, 2, T, T, 16)
    inputs = [x.detach().requires_grad_() for x in given[:3]]
    place = torch.tensor([7], device=DEVICE)

    def step():
        out = METHODS["block_sparse"](*inputs, causal=True, dropout=0.4, seed=place)
        made = out, *torch.autograd.grad(out, inputs, given[3])
        place.add_(1)
        return made

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    for replay in range(2):
        graph.replay()
        for own, exact in zip(made, dropped(given, 0.4, 8 + replay), strict=True):
            assert relative(own, exact) < 2e-5
