"""A block with attention by heads and an MLP in parts is the dense block with the same mask."""

import pytest
import torch

from blockshock.attention import patterns
from blockshock.transformer import HybridBlock, dense_reference
from tests import hybrid_jobs as jobs

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
NAMES = {"output", "x"} | {
    f"{name}.weight" for name in ("attention_norm", "qkv", "out", "mlp_norm", "gate_up", "down")
}


def check(answers, sums=2):
    """Of each rank: figures that pass, the same bits on all ranks, as many sums as planned."""
    for figures, same, forward, backward in answers:
        assert figures.keys() == NAMES
        assert all(figure.passes for figure in figures.values()), figures
        assert same
        assert (forward, backward) == (sums, sums)


def every(answers):
    return [found for answer in answers for found in answer.values()]


@DTYPES
def test_two_ranks_are_the_dense_block(ranks, dtype):
    check(every(ranks.run(jobs.every_pattern, dtype)))


@pytest.mark.slow
def test_four_ranks_are_the_dense_block(four):
    names = "window", "blocks_per_head", "mask_per_head"
    check(every(four.run(jobs.every_pattern, names=names)))


@pytest.mark.parametrize("pattern", jobs.PATTERNS)
def test_one_process_is_the_dense_block_without_a_sum(pattern):
    check([jobs.against_dense(pattern, True)], sums=0)


def test_the_kernels_take_the_heads_of_a_rank(ranks):
    check(ranks.run(jobs.against_dense, "rule_per_head", True, tokens=33, attention="block_sparse"))


@pytest.mark.parametrize("tokens", [1, 63, 130])
def test_any_number_of_tokens(ranks, tokens):
    check(ranks.run(jobs.against_dense, "blocks_per_head", True, tokens=tokens))


def test_keys_are_shared_by_heads_of_queries(ranks):
    check(ranks.run(jobs.against_dense, "blocks_per_head", True, kv_heads=4))
    check(ranks.run(jobs.against_dense, "window", False, kv_heads=4, hidden=40))


@pytest.mark.parametrize("kind", ["heads", "gradient", "part"])
def test_a_fault_is_seen(ranks, kind):
    check(ranks.run(jobs.spoiled, "none"))
    for figures, *_ in ranks.run(jobs.spoiled, kind):
        assert not all(figure.passes for figure in figures.values())


def test_weights_do_not_depend_on_the_ranks(ranks, four):
    alone, _ = jobs.weights()
    for pool in (ranks, four):
        for state, loaded in pool.run(jobs.weights):
            assert loaded
            assert state.keys() == alone.keys()
            assert all(torch.equal(state[name], alone[name]) for name in alone)


def test_gradients_are_clipped_by_the_norm_of_the_whole(ranks):
    for own, dense in ranks.run(jobs.clipped):
        assert own == pytest.approx(dense, rel=1e-5)


def test_compiled_parts_compute_the_same(ranks):
    for differences in ranks.run(jobs.compiled):
        assert max(differences.values()) < 1e-5


def test_the_reference_is_the_definition():
    """Position by position, in float64."""
    width, heads, D, T = 12, 3, 4, 5
    drawn = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=drawn, dtype=torch.float64)

    shapes = {"qkv": (36, 12), "out": (12, 12), "gate_up": (14, 12), "down": (12, 7)}
    weights = {f"{name}.weight": normal(*size) for name, size in shapes.items()}
    weights |= {f"{name}.weight": normal(width) for name in ("attention_norm", "mlp_norm")}
    x = normal(1, T, width)

    def norm(row, name):
        return row / (row.pow(2).mean() + 1e-5).sqrt() * weights[f"{name}.weight"]

    rows = []
    for i in range(T):
        q = (weights["qkv.weight"] @ norm(x[0, i], "attention_norm"))[:width].view(heads, D)
        seen = [j for j in range(i + 1) if i - j <= 2]
        kv = [weights["qkv.weight"] @ norm(x[0, j], "attention_norm") for j in seen]
        k, v = (torch.stack([row[a : a + width].view(heads, D) for row in kv]) for a in (12, 24))
        scores = torch.einsum("hd,jhd->hj", q, k) / D**0.5
        mixed = torch.einsum("hj,jhd->hd", scores.softmax(-1), v).flatten()
        row = x[0, i] + weights["out.weight"] @ mixed
        gate, up = (weights["gate_up.weight"] @ norm(row, "mlp_norm")).chunk(2)
        rows.append(row + weights["down.weight"] @ (gate / (1 + (-gate).exp()) * up))
    found = dense_reference(x, weights, heads, pattern=patterns.band(2))
    torch.testing.assert_close(found[0], torch.stack(rows), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "width = 128, heads = 5: the width of a head must be a whole number"),
        ({"heads": 0}, "heads = 0: an int of at least 1 is needed"),
        ({"kv_heads": 3}, "kv_heads = 3 is no divisor of heads = 8"),
        ({"attention": "flashy"}, "unknown method 'flashy'"),
        (
            {"attention": "flash_torch", "pattern": patterns.strided(4)},
            "pattern strided(4, 4): flash_torch computes full and causal attention only",
        ),
        ({"pattern": patterns.from_mask(torch.ones(3, 9, 9) > 0)}, "heads 8: pattern mask"),
        ({"reduce": "some"}, "unknown sum 'some'; use one of auto, collective"),
        ({"causal": "yes"}, "causal = 'yes'"),
        ({"pattern": "band"}, "pattern 'band': make one with a builder"),
        ({"pattern": torch.ones(9, 9) > 0}, "give a mask to from_mask"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    assert message in jobs.refused(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 1}, "heads = 1 is not a multiple of 2 ranks, which hold equal parts"),
        ({"kv_heads": 1}, "kv_heads = 1 is not a multiple of 2 ranks"),
        ({"hidden": 7}, "hidden = 7 is not a multiple of 2 ranks"),
        (
            {"seeds": True},
            "the ranks disagree about the arguments, the generator's state: rank 0 has digest",
        ),
        (
            {"windows": True},
            "disagree about the arguments, pattern: rank 0 has band(20), rank 1 has band(21",
        ),
    ],
)
def test_ranks_that_cannot_share_it_are_told(cpu_ranks, options, message):
    for told in cpu_ranks.run(jobs.refused, **options):
        assert message in told


def test_ranks_with_other_x_are_an_error(ranks):
    for training in ranks.run(jobs.another_x):
        for said in training:
            assert "x of layer 'HybridBlock' is not the same on all ranks" in said


def test_x_of_another_width_is_refused():
    block = HybridBlock(32, 2)
    with pytest.raises(ValueError, match=r"x \[3, 32\]: \[batch, tokens, 32\] is needed"):
        block(torch.zeros(3, 32))
