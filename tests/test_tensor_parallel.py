"""Ranks that compute a decoder together compute what their plan says, forward and backward."""

import pytest
import torch

from blockshock.transformer import Decoder, TensorParallelDecoder, compile_model, counts, sync
from blockshock.transformer.language_model import part_compiler
from tests import tensor_parallel_jobs as jobs

LIMIT = 2e-5  # relative, of float32 sums in another order
METHODS = ["naive", "flat", "bucketed", "overlapped", "sharded_optimizer", "torch_ddp"]


@pytest.fixture(params=[2, 4])
def some(request, ranks, four):
    """The ranks of the session, then four."""
    return ranks if request.param == 2 else four


def check(answers, *, vocabulary_parallel=False):
    for answer in answers:
        for plan, found in answer.items():
            syncs = sync.plan(plan, jobs.SIZES["depth"]).syncs
            more = (2, 2) if vocabulary_parallel else (0, 1)
            assert found["collectives"] == (syncs + more[0], syncs + more[1]), plan
            right(found, plan)


def right(found, what="", limit=LIMIT):
    assert found["same"], what
    for name in {"logits", "loss", "gradients"} & found.keys():
        assert found[name] < limit, (what, found)


@pytest.mark.parametrize("plan", jobs.PLANS)
def test_one_rank_is_the_dense_decoder_whatever_the_plan(plan):
    c = jobs.config(attention=None)
    state, (tokens, targets) = jobs.weights(c), jobs.batch(c)
    dense, model = Decoder(c), TensorParallelDecoder(c, plan=plan)
    dense.load_state_dict(state)
    model.load_full_state_dict(state)
    losses = [one(tokens, targets) for one in (dense, model)]
    for loss in losses:
        loss.backward()
    if plan == "parallel":  # MLPs that read what attention reads are another model
        assert abs(losses[0] - losses[1]) > 100 * LIMIT
        return
    true = {name: p.grad for name, p in dense.named_parameters()}
    assert jobs.apart(losses[1], losses[0]) < LIMIT
    assert jobs.apart(model.gather_gradients(), true) < LIMIT


def test_every_plan_is_its_simulation_with_as_many_collectives_as_it_says(ranks):
    check(ranks.run(jobs.all_plans))


def test_four_ranks_are_their_simulation_as_well(four):
    check(four.run(jobs.all_plans, ("tp", "selective:[0,3,4]", "desync:2", "parallel")))


def test_with_embedding_and_head_in_parts_as_well(some):
    plans = "tp", "3", "desync:2", "parallel"
    check(some.run(jobs.all_plans, plans, vocabulary_parallel=True), vocabulary_parallel=True)


@pytest.mark.parametrize("seed", [0, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_models_and_plans_are_their_simulation(some, seed):
    for answer in some.run(jobs.gate, seed, 8):
        assert len(answer) == 8
        for what, found in answer.items():
            right(found, what, 1e-11)


def test_plans_differ_and_a_sync_after_every_sublayer_is_the_dense_decoder(ranks):
    c = jobs.config()
    plans = ("tp", "spd", "2", "desync:spd", "parallel")
    answers = ranks.run(jobs.losses, plans)
    for found in answers:
        assert len({round(loss, 4) for loss in found.values()}) == len(plans)
    dense = Decoder(c)
    dense.load_state_dict(jobs.weights(c))
    true = dense(*jobs.batch(c)).item()
    assert [found["tp"] for found in answers] == pytest.approx([true] * len(answers), rel=1e-4)


def test_heads_keep_their_patterns(some):
    for found in some.run(jobs.per_head_pattern, "spd"):
        right(found)


@pytest.mark.parametrize("options", [{}, {"vocabulary_parallel": True}])
def test_weights_do_not_depend_on_the_number_of_ranks(some, options):
    assert all(some.run(jobs.dense_again, **options))


def test_all_plans_have_the_dense_decoders_parameters():
    c = jobs.config()
    models = [TensorParallelDecoder(c, plan=plan) for plan in jobs.PLANS]
    sizes = {sum(p.numel() for p in model.parameters()) for model in (Decoder(c), *models)}
    assert sizes == {counts(c).parameters}


@pytest.mark.parametrize(
    ("plan", "graphs", "options"),
    [
        ("tp", 3, {}),
        ("2", 5, {"checkpoint_blocks": True}),
        ("desync:spd", 3, {"vocabulary_parallel": True}),
    ],
)
def test_sublayers_are_compiled_whole(ranks, plan, graphs, options):
    for error, found in ranks.run(jobs.compiled, plan, **options):
        assert found == graphs
        assert error < LIMIT


@pytest.mark.parametrize("vocabulary_parallel", [False, True])
@pytest.mark.parametrize("plan", ["tp", "2", "desync:spd", "parallel"])
def test_a_step_with_kept_keys_is_the_next_position(ranks, plan, vocabulary_parallel):
    syncs = sync.plan(plan, jobs.SIZES["depth"]).syncs
    answers = ranks.run(jobs.decoded, {"kv_heads": 2}, plan, vocabulary_parallel)
    for error, number, same in answers:
        assert error < LIMIT
        assert number == syncs + 2 * vocabulary_parallel
        assert same


def test_ranks_with_different_seeds_write_the_same_text(ranks):
    assert all(ranks.run(jobs.sampled))


def test_uses_outside_the_laboratory_are_right_or_one_error(ranks):
    for said in ranks.run(jobs.used_otherwise):
        for name in ("a copy", "parts after a cast", "norm to clip by", "all targets ignored"):
            assert said.pop(name), name
        assert "each rank loads its own" in said.pop("another rank's state")
        assert "size mismatch" in said.pop("a whole state")
        assert 'Missing key(s) in state_dict: "head.norm.weight"' in said.pop(
            "a whole state that lacks one"
        )
        assert "columns, and the whole one has" in said.pop("a whole state of another width")
        wider = said.pop("a wider model's state")
        assert "gate_up.weight: 96 rows, and the whole one has 48" in wider
        assert "one rank's part" in said.pop("a norm of a part")
        assert all("index" in text for text in said.values()), said


def test_steps_of_decoding_that_cannot_be_right_are_refused_or_nan(ranks):
    for said in ranks.run(jobs.wrong_steps):
        assert "position = 4: the cache has room for the ints 0 to 3" in said["room"]
        assert "position = tensor(0)" in said["position"]
        assert "make it with this model's `cache`" in said["heads"]
        assert "under the same autocast" in said["dtype"]
        assert said["a position left out"]


def test_what_ranks_cannot_hold_together_is_refused(ranks):
    for said in ranks.run(jobs.refused):
        for name in ("heads", "kv_heads", "hidden", "vocabulary"):
            assert f"{name} = " in said[name]
            assert "is not a multiple of 2 ranks" in said[name]
        assert "plan 'spd' is of 3 blocks, the model has 4" in said["plan"]
        assert "sync plan 12: give a name, such as 'spd'" in said["no name"]
        assert "unknown sum 'quick'; use one of auto" in said["reduce"]
        assert "use linear=None" in said["linear"]
        assert "the ranks disagree about the arguments, the generator's state" in said["seed"]
        assert "the ranks disagree about the arguments, plan: rank 0 has Plan" in said["ranks"]
        for name in ("tokens", "targets"):
            assert f"the ranks disagree about the call, {name}: rank 0 has [2, 16]" in said[name]


@pytest.mark.parametrize("method", METHODS)
def test_beside_data_parallel_ranks_steps_are_those_of_one_process(four, method):
    plan = "selective:[0]" if method == "overlapped" else "spd"
    for norms, error, same in four.run(jobs.trained_like_simulation, method, plan):
        assert norms < LIMIT
        assert error < 10 * LIMIT  # of three steps of AdamW
        assert same


@pytest.mark.parametrize("method", ["overlapped", "sharded_optimizer"])
def test_parts_of_the_default_group_are_clipped_by_the_norm_of_the_whole(ranks, method):
    assert max(ranks.run(jobs.clipped_beside_none, method)) < LIMIT


def test_data_parallel_methods_that_would_mix_parts_are_refused(four):
    for mixed, sharded, fsdp in four.run(jobs.refused_methods):
        assert "give group= the ranks that hold the same part" in mixed
        assert "would shard it again; use 'overlapped'" in sharded
        assert "would shard it again" in fsdp


@pytest.mark.slow
def test_models_of_all_plans_can_be_compiled_in_one_process():
    torch._dynamo.reset()
    tokens, targets = jobs.batch(jobs.config())
    for plan in jobs.PLANS:
        generator = torch.Generator().manual_seed(0)
        model = TensorParallelDecoder(jobs.config(), plan=plan, generator=generator)
        eager = model(tokens, targets)
        compile_model(model, backend="eager")
        assert torch.allclose(model(tokens, targets), eager)
        with torch.no_grad():
            assert torch.allclose(model(tokens, targets), eager)


def test_models_with_one_compiler_share_their_graphs():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    tokens, targets = jobs.batch(jobs.config())
    compiler, counted = part_compiler(backend=backend), []
    for plan in ("spd", "spd", "2", "4"):
        generator = torch.Generator().manual_seed(0)
        model = TensorParallelDecoder(jobs.config(), plan=plan, generator=generator)
        eager = model(tokens, targets)
        model.compile_parts(compiler)
        assert torch.allclose(model(tokens, targets), eager)
        counted.append(len(graphs))
    # Attention, MLP and head; then attention in the middle of a group and an MLP that ends none.
    assert counted == [3, 3, 5, 5]


def test_a_plan_of_many_places_compiles_beyond_the_usual_limit():
    torch._dynamo.reset()
    c = jobs.config()
    tokens, targets = jobs.batch(c)
    model = TensorParallelDecoder(c, plan="2", generator=torch.Generator().manual_seed(0))
    eager = model(tokens, targets)
    # Attention is first in its group, and in the middle: more compilations than PyTorch may keep.
    with torch._dynamo.config.patch(recompile_limit=1):
        assert torch.allclose(compile_model(model, backend="eager")(tokens, targets), eager)


def test_replicas_that_fell_apart_are_seen(ranks):
    for before, after in ranks.run(jobs.apart_on_purpose):
        assert before == 0
        assert 0.05 < after < 0.5


@pytest.mark.parametrize("plan", ["tp", "2", "desync:2", "parallel"])
def test_bf16_costs_what_rounding_costs(ranks, plan):
    found = ranks.run(jobs.low_precision, plan)[0]
    assert set(found) > {"logits", "embedding.weight", "blocks.3.down.bias"}
    assert not {name: each for name, each in found.items() if not each[0] < each[1]}


@pytest.mark.gpus(2)
@pytest.mark.parametrize("job", [jobs.summed, jobs.summed_elsewhere], ids=["here", "elsewhere"])
@pytest.mark.parametrize("reduce", ["auto", "exchange", "two_shot"])
def test_sums_by_other_ways_give_the_same(ranks, reduce, job):
    for answer in ranks.run(job, reduce):
        for plan, found in answer.items():
            right(found, plan)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("reduce", ["collective", "auto", "exchange"])
def test_a_cuda_graph_holds_a_step_with_its_sums(ranks, reduce):
    assert max(ranks.run(jobs.captured, reduce)) < 1e-6
