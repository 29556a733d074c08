"""The decoder computes what its definition says, however it is run."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blockshock.attention import patterns
from blockshock.distributed.ranks import RankFailure
from blockshock.transformer import Decoder, DecoderConfig, compile_model, counts
from blockshock.transformer.sublayers import rotate
from tests.decoder_jobs import against_dense, sampled

SIZES = {"vocabulary": 61, "context": 24, "width": 48, "depth": 2, "heads": 4}


def config(**changed):
    return DecoderConfig(**{**SIZES, "attention": "reference", **changed})


def made(*, seed=0, checkpoint_blocks=False, **changed):
    generator = torch.Generator().manual_seed(seed)
    return Decoder(config(**changed), checkpoint_blocks=checkpoint_blocks, generator=generator)


def batch(T=24, B=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(61, (2, B, T), generator=generator).unbind()


def gradients(model, tokens, targets):
    model.zero_grad(set_to_none=True)
    loss = model(tokens, targets)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def by_definition(model, tokens):
    """Logits [T, V] of one sequence, position by position, in plain Python loops."""
    c, state = model.config, {name: value.double() for name, value in model.state_dict().items()}
    D, group = c.width // c.heads, c.heads // c.kv_heads

    def norm(x, name):
        return x / (x.pow(2).mean() + c.eps).sqrt() * state[name]

    def turned(x, t):
        y = x.clone()
        for i in range(D // 2):
            angle = t * c.rope_base ** (-2 * i / D)
            a, b = x[i], x[i + D // 2]
            y[i] = a * math.cos(angle) - b * math.sin(angle)
            y[i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
        return y

    stream = [state["embedding.weight"][token] for token in tokens]
    for n in range(c.depth):
        at = f"blocks.{n}."
        heads = [(state[at + "qkv.weight"] @ norm(x, at + "attention_norm.weight")) for x in stream]
        heads = [x.view(-1, D) for x in heads]
        for t in range(len(stream)):
            mixed = []
            for h in range(c.heads):
                key = c.heads + h // group
                q = turned(heads[t][h], t)
                scores = torch.stack([q @ turned(heads[s][key], s) for s in range(t + 1)])
                weights = (scores / math.sqrt(D)).softmax(0)
                values = torch.stack([heads[s][key + c.kv_heads] for s in range(t + 1)])
                mixed.append(weights @ values)
            stream[t] = stream[t] + state[at + "out.weight"] @ torch.cat(mixed)
        for t, x in enumerate(stream):
            both = state[at + "gate_up.weight"] @ norm(x, at + "mlp_norm.weight")
            gate, up = both[: c.hidden], both[c.hidden :]
            inner = gate / (1 + (-gate).exp()) * up
            stream[t] = x + state[at + "down.weight"] @ inner
    head = state["embedding.weight" if c.tied else "head.linear.weight"]
    return torch.stack([head @ norm(x, "head.norm.weight") for x in stream])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tied": False},
        {"kv_heads": 2},
        {"kv_heads": 1, "rope_base": 500.0},
        {"attention": "flash_torch", "hidden": 40},
        {"attention": None},
    ],
    ids=lambda changed: "-".join(map(str, changed)) or "usual",
)
def test_logits_and_loss_are_those_of_the_definition(changed):
    model = made(**changed).double()
    tokens, targets = batch(T=9)
    targets[0, 2:4] = -100
    logits = model(tokens)
    truth = torch.stack([by_definition(model, each) for each in tokens])
    torch.testing.assert_close(logits, truth, rtol=1e-9, atol=1e-9)
    kept = targets != -100
    chosen = truth.log_softmax(-1)[kept].gather(1, targets[kept][:, None])
    torch.testing.assert_close(model(tokens, targets), -chosen.mean(), rtol=1e-9, atol=0)


def test_the_loss_of_a_new_model_is_that_of_a_guess():
    assert abs(made()(*batch()).item() - math.log(61)) < 0.1


def test_scores_depend_on_the_distance_of_two_positions_alone():
    model = made()
    q, k = torch.randn(2, 1, 4, 1, 12, dtype=torch.float64).unbind()

    def score(at_q, at_k):
        ropes = [[part[-1:] for part in model.double()._rope(t + 1)] for t in (at_q, at_k)]
        turned = [rotate(x, rope) for x, rope in zip((q, k), ropes, strict=True)]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(9, 4), score(1009, 1004))
    assert not torch.allclose(score(9, 4), score(9, 5))


@pytest.mark.parametrize("attention", ["reference", "flash_torch"])
def test_future_tokens_change_nothing(attention):
    model = made(attention=attention)
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10], after[:, 10])


def test_a_pattern_is_joined_with_causal():
    model = made(depth=1, pattern=patterns.band(3))
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 61
    same = (model(tokens) == model(changed)).all(-1).all(0)
    assert same.tolist() == [False] * 4 + [True] * 20


def test_the_weights_are_seeded_alike_whatever_the_default_generator_does():
    first = made(seed=3).state_dict()
    state = torch.get_rng_state()
    again, other = made(seed=3).state_dict(), made(seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.qkv.weight"], other["blocks.0.qkv.weight"])
    deep = made(width=256, hidden=512, depth=8).state_dict()
    assert abs(deep["blocks.3.qkv.weight"].std() / 0.02 - 1) < 0.02
    assert abs(deep["blocks.3.down.weight"].std() / (0.02 / 4) - 1) < 0.02


def test_checkpointed_blocks_give_the_same_gradients():
    plain, kept = made(), made(checkpoint_blocks=True)
    for (one, all_), (other, same) in [(gradients(plain, *batch()), gradients(kept, *batch()))]:
        assert torch.equal(one, other)
        assert all(torch.equal(a, b) for a, b in zip(all_, same, strict=True))


def test_checkpointed_blocks_keep_their_inputs_alone():
    held = {}
    for checkpointed in (False, True):
        saved = []
        model = made(checkpoint_blocks=checkpointed, depth=4)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: (saved.append(x.nbytes), x)[1], lambda x: x
        ):
            model(*batch())
        held[checkpointed] = sum(saved)
    assert held[True] < held[False] / 4


@pytest.mark.parametrize("attention", ["reference", "flash_torch"])
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_a_compiled_model_has_no_graph_breaks_and_the_same_gradients(attention, checkpoint_blocks):
    torch._dynamo.reset()
    options = {"attention": attention, "checkpoint_blocks": checkpoint_blocks}
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = compile_model(made(**options), backend=backend)
    found, true = gradients(model, *batch()), gradients(made(**options), *batch())
    assert len(graphs) == 2  # one for all blocks, one for the head
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)


def test_a_copy_of_a_compiled_model_computes_by_its_own_weights():
    torch._dynamo.reset()
    model = compile_model(made(), backend="eager")
    before = model(*batch())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(*batch()), before)
    assert list(twin.state_dict()) == list(made().state_dict())


def test_hooks_on_a_block_of_a_compiled_model_run():
    torch._dynamo.reset()
    model, seen = compile_model(made(), backend="eager"), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append("before"))
    model(*batch())
    assert seen == ["before"] * 2


def test_inside_autocast_products_are_bf16_and_the_loss_is_float32():
    model = made()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batch()[0]).dtype == torch.bfloat16
        loss, found = gradients(model, *batch())
    true_loss, true = gradients(made(), *batch())
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in found)
    assert abs(loss - true_loss) < 0.01
    norm = torch.cat([x.flatten() for x in true]).norm()
    apart = torch.cat([(a - b).flatten() for a, b in zip(found, true, strict=True)]).norm()
    assert apart < 0.03 * norm


def test_positions_are_exact_in_a_model_cast_to_bf16():
    cos, _ = made().bfloat16()._rope(24)
    assert torch.equal(cos, made()._rope(24)[0])


@pytest.mark.parametrize("changed", [{}, {"pattern": patterns.band(3)}, {"kv_heads": 2}])
def test_generated_tokens_are_the_most_probable_ones_of_the_whole_sequence(changed):
    model = made(**changed)
    tokens, _ = batch(T=3)
    found = model.generate(tokens, 8, temperature=0)
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, tokens)


@pytest.mark.parametrize("changed", [{}, {"kv_heads": 2, "bias": True}, {"attention": None}])
def test_a_step_with_kept_keys_is_the_next_position(changed):
    model, (tokens, _) = made(**changed), batch()
    logits, caches = model(tokens), model.cache(*tokens.shape)
    for t in range(tokens.shape[1]):
        step = model.decode_step(tokens[:, t : t + 1], caches, t)
        torch.testing.assert_close(step, logits[:, t], rtol=1e-4, atol=1e-5)


def test_a_cache_is_in_the_dtype_of_the_products():
    model, (tokens, _) = made(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        caches = model.cache(2, 3)
        assert model.decode_step(tokens[:, :1], caches, 0).dtype == torch.bfloat16
    assert {kept.dtype for block in caches.blocks for kept in block} == {torch.bfloat16}


def test_samples_are_seeded_and_of_the_top_k():
    model, (tokens, _) = made(), batch(T=3)

    def sample(seed, **options):
        return model.generate(tokens, 9, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(0, top_k=1), model.generate(tokens, 9, temperature=0))
    assert sample(0).shape == (2, 12)
    assert torch.equal(model.generate(tokens, 0), tokens)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tied": False},
        {"kv_heads": 2},
        {"hidden": 40, "depth": 3},
        {"kv_heads": 2, "bias": True},
    ],
)
def test_counts_are_those_of_the_model_and_of_pytorch(changed):
    model = made(**changed)
    found = counts(model.config, 12)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    tables = (1 if model.config.tied else 2) * 61 * 48
    assert found.parameters_without_embeddings == found.parameters - tables
    with FlopCounterMode(display=False) as counter:
        gradients(model, *batch(T=12, B=3))
    assert counter.get_total_flops() == 3 * 12 * found.flops_per_token
    attention = 6 * model.config.depth * 48 * 12
    assert found.flops_per_token - found.flops_per_token_causal == attention


def test_the_model_of_gpt_2_small_has_124_million_parameters():
    found = counts(DecoderConfig(vocabulary=50304, context=1024, width=768, depth=12, heads=12))
    assert round(found.parameters / 1e6) == 124


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": 50}, "width = 50, heads = 4.*make width a multiple of 8"),
        ({"width": 52}, "width = 52, heads = 4"),
        ({"kv_heads": 3}, "kv_heads = 3 is no divisor of heads = 4"),
        ({"depth": 0}, "depth = 0: an int of at least 1"),
        ({"hidden": 1.5}, "hidden = 1.5: an int"),
        ({"heads": True}, "heads = True: an int"),
        ({"eps": 0.0}, "eps = 0.0: it must be above 0"),
        ({"rope_base": 1.0}, "rope_base = 1.0: it must be above 1"),
        ({"attention": "flashy"}, "unknown method 'flashy'; use one of reference"),
        ({"linear": "sparse"}, "linear = 'sparse': use one of dense_single"),
        ({"attention": "flash_torch", "pattern": patterns.band(2)}, "use block_sparse"),
        ({"attention": "flash_triton", "width": 16}, "D = 4"),
        ({"pattern": patterns.from_mask(torch.ones(8, 8, dtype=torch.bool))}, "made for Tq 8"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_value_and_fix(changed, message):
    with pytest.raises(ValueError, match=message):
        config(**changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x.int()), r"tokens int32 \[2, 24\]: int64"),
        (lambda m, x: m(x[0]), r"tokens int64 \[24\]"),
        (lambda m, x: m(x.repeat(1, 2)), "48 tokens: the context is 24"),
        (lambda m, x: m(x, x[:, 1:]), r"targets int64 \[2, 23\]: int64 \[2, 24\]"),
        (lambda m, x: m.generate(x, 1), "24 tokens and n = 1"),
        (lambda m, x: m.generate(x[:, :3], -1), "n = -1"),
        (lambda m, x: m.generate(x[:, :0], 3), "at least one token"),
        (lambda m, x: m.generate(x[:, :3], 3, temperature=-1), "temperature = -1"),
        (lambda m, x: m.generate(x[:, :3], 3, top_k=62), "top_k = 62: 1 to 61"),
        (lambda m, x: m.cache(2, 25), "a cache of 25 tokens: 1 to context = 24"),
        (lambda m, x: m.decode_step(x, m.cache(2, 9), 0), r"token \[2, 24\]: int64 \[2, 1\]"),
        (lambda m, x: m.decode_step(x[:1, :1], m.cache(2, 9), 0), r"token \[1, 1\]"),
        (lambda m, x: m.decode_step(x[:, :1], m.cache(2, 9), 9), "position = 9: .* 0 to 8"),
        (lambda m, x: m.decode_step(x[:, :1], m.cache(2, 9), -1), "position = -1"),
        (
            lambda m, x: made(pattern=patterns.band(2)).decode_step(x[:, :1], m.cache(2, 9), 0),
            "a model with pattern band.* use generate",
        ),
        (lambda m, x: counts(m.config, 25), "tokens = 25: 1 to context = 24"),
    ],
)
def test_a_call_that_cannot_be_is_refused_with_value_and_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call(made(), batch()[0])


def test_a_config_can_be_stored_and_made_again():
    c = config(kv_heads=2)
    assert DecoderConfig(**dataclasses.asdict(c)) == c


@pytest.mark.parametrize("linear", ["dense_tp_row", "dense_tp_column", "block_shock"])
def test_a_linear_method_in_the_projections_gives_the_dense_model(ranks, linear):
    for replaced, dense, own, error in ranks.run(against_dense, linear):
        assert replaced == [f"blocks.0.{x}" for x in ("qkv", "out", "gate_up", "down")]
        assert own == pytest.approx(dense, rel=1e-6)
        assert error < 1e-5


@pytest.mark.parametrize("linear", ["dense_tp_row", "block_shock"])
def test_ranks_that_hold_projections_together_write_one_text(ranks, linear):
    assert all(ranks.run(sampled, linear))


def test_a_linear_method_that_cannot_hold_a_projection_is_refused(ranks):
    with pytest.raises(RankFailure, match=r"linear = 'block_shock' cannot hold blocks\.0\.qkv"):
        ranks.run(made_with_block_shock)


def made_with_block_shock():
    made(linear="block_shock")
