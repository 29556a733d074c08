"""Block-sparse layers in the laboratory: what is measured, what is checked, and what is refused."""

import json

import pytest
import torch

from bench import asked, sweep
from blockshock.block_sparse import METHODS, supermasks
from blockshock.block_sparse.semi_structured import SemiStructured
from blockshock.distributed import Ranks
from blockshock.kernels import block_lists
from blockshock.phases import block_sparse as laboratory
from blockshock.phases.block_sparse import layers, models, planning
from blockshock.phases.block_sparse.case import OF_PHASE, BlockSparseCase
from blockshock.phases.engine import Options
from blockshock.phases.session import CaseFailed, Laboratory
from tests.block_sparse_checks import DEVICE

# PyTorch says once a process that its sparse tensors are new.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse (BSR|CSR) tensor support is in beta"),
    pytest.mark.usefixtures("one_thread"),
]

CEILINGS = {
    "matrix_flops": {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11},
    "copy_bytes_per_s": 1e10,
    "link_bytes_per_s": 1e9,
}
LAYER = {"N": 192, "K": 128, "B": 80, "block": 32, "sparsity": 0.8}
MODEL = {"N": 128, "K": 64, "B": 3, "block": 32, "sparsity": 0.5, "depth": 2, "image": 32}
SMALL = {phase: MODEL if phase in ("model", "supermask") else LAYER for phase in OF_PHASE}
DTYPE = "bf16" if DEVICE == "cuda" else "fp32"  # which every method takes there


def case(phase="forward", method=None, **changed):
    method = method or OF_PHASE[phase][0]
    return BlockSparseCase(phase, method, **{**SMALL[phase], "dtype": DTYPE, **changed})


def made(one):
    """(problem, what is built, experiment) in this process."""
    problem = laboratory.problem(one, torch.device(DEVICE))
    built = laboratory.build(one, problem)
    return problem, built, laboratory.PHASES[one.phase][1](one, built, problem)


def passes(one, spoil=lambda problem, built: None):
    """By result, whether the check passes of what was built and then spoilt."""
    problem, built, experiment = made(one)
    spoil(problem, built)
    return {name: figure.passes for name, figure in experiment.check().items()}


@pytest.fixture(scope="module")
def lab():
    with Ranks(1, device=DEVICE) as pool:
        yield Laboratory(pool, Options(rounds=3, seconds=0.01, ceilings=CEILINGS))


CHECKED = {
    "forward": {"output"},
    "backward": {"output", "grad_input", "grad_bias"},
    "planning": {"output"},
    "model": {"output"},
    "supermask": {"output", "gradient"},
}


@pytest.mark.parametrize("phase", OF_PHASE)
def test_every_method_of_a_phase_passes_its_check(phase):
    for method in OF_PHASE[phase]:
        one = case(phase, method)
        found = passes(one)
        assert all(found.values()), (one.id, found)
        own = {"dense": "weight", "bsr": "values", "semi_structured": "values"}
        more = {f"grad_{own[method]}"} if phase == "backward" else set()
        more |= {"scores"} if method == "supermask" else set()
        assert set(found) == CHECKED[phase] | more


@pytest.mark.parametrize("phase", ["backward", "supermask"])
def test_bf16_is_held_to_what_bf16_costs_a_dense_layer(phase):
    for method in OF_PHASE[phase]:
        for figure in made(case(phase, method, dtype="bf16"))[2].check().values():
            assert figure.passes
            assert 1e-3 < figure.dense_relative < 0.1


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_layers_with_an_activation_and_without_a_bias_pass(activation):
    for method in OF_PHASE["backward"]:
        found = passes(case("backward", method, activation=activation, bias=False))
        assert all(found.values())
        assert "grad_bias" not in found


def _change(tensor):
    with torch.no_grad():
        tensor.view(-1)[0] += 0.1


def _lose(tensor):
    with torch.no_grad():
        tensor.zero_()


FAULTS = {
    "a weight": ("forward", "dense", lambda _, built: _change(built.weight)),
    "a tile": ("forward", "bsr", lambda _, built: _change(built.values)),
    "a held entry": ("forward", "semi_structured", lambda _, built: _change(built.values)),
    "a bias": ("forward", "bsr", lambda _, built: _change(built.bias)),
    "a model's weights": ("model", "bsr", lambda _, built: _lose(built.blocks[1].mlp.down.values)),
    "another mask": ("forward", "bsr", lambda problem, built: _another(problem, built)),
}


def _another(problem, built):
    built.lists = block_lists.lists(problem.mask.flip(0), problem.kept)


def _forgets(_, run):
    for _, layer in supermasks(run.model):
        layer.sparsity = 0.25


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_fails_where_a_part_is_wrong(fault):
    phase, method, spoil = FAULTS[fault]
    assert not all(passes(case(phase, method), spoil).values())


def test_the_check_fails_of_lists_of_another_mask_and_of_masks_of_another_sparsity():
    def another(problem, built):
        built.mask = problem.mask.flip(0)

    assert passes(case("planning", "plan"), another) == {"output": False}
    assert not any(passes(case("supermask", "supermask"), _forgets).values())


def test_a_gradient_that_lets_dropped_tiles_through_fails():
    def through(_, run):
        for _, layer in supermasks(run.model):
            layer.gradient = "through"

    assert passes(case("supermask", "supermask"), through) == {
        "output": True,
        "gradient": False,
        "scores": True,
    }


def test_layers_of_one_point_have_the_same_weight_and_mask():
    one = case("forward", "bsr")
    problem, layer, _ = made(one)
    dense = layers.build(case("forward", "dense"), problem)
    assert torch.equal(layer.to_dense(), dense.weight)
    assert layer.lists.kept == problem.kept == 24 - int(0.8 * 24)
    held = problem.held(halved=True)
    assert (held.view(192, -1, 4).ne(0).sum(-1) <= 2).all()


def test_a_model_holds_its_mlps_alone_in_the_storage():
    for method, kind in (("bsr", METHODS["bsr"]), ("semi_structured", SemiStructured)):
        _, built, _ = made(case("model", method))
        sparse = [name for name, m in built.named_modules() if isinstance(m, kind)]
        assert sparse == [f"blocks.{i}.mlp.{part}" for i in range(2) for part in ("up", "down")]


def test_a_model_whose_layers_are_not_all_replaced_is_refused_with_the_reason(monkeypatch):
    def refuses(N, K, **_):
        return "too wide" if K > N else None

    monkeypatch.setattr(METHODS["bsr"], "unsupported", refuses)
    with pytest.raises(ValueError, match=r"(?s)not every layer .*blocks.0.mlp.down: too wide"):
        made(case("model", "bsr"))


def test_nothing_is_dropped_at_sparsity_0():
    for phase, method in (("forward", "bsr"), ("model", "bsr"), ("supermask", "supermask")):
        assert all(passes(case(phase, method, sparsity=0)).values())


def test_the_work_of_a_model_counts_kept_tiles_alone():
    counted = {}
    for method in ("dense", "bsr"):
        problem, built, _ = made(case("model", method))
        counted[method] = models.forward_flops(problem.case, built)
    mlps = 2 * 3 * 5 * 2 * 2 * 128 * 64  # 3 images of 5 tokens, 2 blocks of 2 layers
    assert counted["dense"] - counted["bsr"] == mlps / 2
    parts = 2 * 3 * 4 * 64 * 3 * 16**2 + 2 * 3 * 64 * 1000 + 2 * 4 * 15 * 5 * 64
    assert counted["dense"] == parts + mlps + 2 * 15 * 2 * 4 * 64 * 64


def test_a_plan_is_made_of_a_mask_whose_count_is_known():
    problem, built, _ = made(case("planning", "plan"))
    assert isinstance(built, planning.Planner)
    assert built.kept == int(problem.mask.sum())
    assert built.parameters() == ()


SLOW = "model", "supermask"


@pytest.mark.parametrize(
    "phase", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in OF_PHASE]
)
def test_the_methods_of_a_point_are_measured_side_by_side(lab, phase):
    point = [case(phase, method) for method in OF_PHASE[phase]]
    for one in point:
        samples, info = lab.result(one, point)
        assert len(samples) == 3
        assert len(info["timing"]["interleaved_with"]) == len(point) - 1
        assert info["rates"]["limit_fraction"] > 0
        assert info["floor"]["wire"] == 0
        wanted = {"model": "forward", "supermask": "optimizer", "backward": "backward"}
        assert wanted.get(phase, "forward" if one.method != "plan" else "plan") in info["regions"]
        if one.method in METHODS and phase in ("forward", "backward"):
            dense = 2 * one.B * one.N * one.K
            share = {"dense": 1, "semi_structured": 0.5}.get(one.method, 5 / 24)
            assert info["work"]["flops"] == pytest.approx(dense * share)
            assert info["work"]["kept_tiles"] == 5


def test_names_tell_cases_apart():
    assert case(dtype="bf16").id == "block_sparse_forward/dense-N192-K128-B80-b32-s0.8-bf16"
    gelu = case("backward", activation="gelu", bias=False)
    assert gelu.point_label.endswith("-activation=gelu-bias=False")
    tiny = case("model", dtype="bf16", heads=4, compiled=True)
    expected = "64x2-N128-H4-B3-b32-s0.5-bf16-image=32-compiled=True"
    assert tiny.id == f"block_sparse_model/dense-{expected}"
    assert case(shape="tiny").id == case().id
    assert case(method="bsr").point == case(method="torch_bsr").point == case().point
    assert case("planning", "bsr").point == case("planning", "plan")
    assert case(block=16).problem_seed == case("backward").problem_seed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"method": "supermask"},
            "forward does not measure supermask; use one of dense, torch_bsr",
        ),
        ({"phase": "backward", "method": "torch_bsr"}, "backward does not measure torch_bsr"),
        ({"sparsity": 1.0}, "sparsity = 1.0: a number from 0 to below 1"),
        ({"sparsity": "0.9"}, "sparsity = '0.9' must be a number"),
        ({"block": 1024, "sparsity": 0.5}, "leaves less than one tile"),
        ({"activation": "silu"}, "unknown activation 'silu'; use one of relu, gelu"),
        ({"phase": "model", "heads": 5}, "width = 64 is no multiple of heads = 5"),
    ],
)
def test_a_case_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        case(**changed)


def test_what_cannot_run_is_told_before_it_is_run():
    assert case().unsupported(DEVICE) is None
    assert "measured on one rank, and 2 run" in case(ranks=2).unsupported("cpu")
    assert "block = 48: use one of 16" in case(method="bsr", block=48).unsupported("cpu")
    assert "block = 48" in case("planning", "plan", block=48).unsupported("cpu")
    assert "N = 200" in case(method="torch_bsr", N=200).unsupported("cuda")
    assert "takes fp32 or fp64" in case(method="torch_bsr", dtype="bf16").unsupported("cpu")
    assert "multiple of 64" in case("model", "semi_structured", N=160).unsupported("cpu")
    assert "fp16 needs a scale" in case("supermask", dtype="fp16").unsupported("cuda")
    assert case("supermask", "supermask", block=48).unsupported("cpu") is None


def test_training_steps_are_never_captured():
    assert laboratory.FAMILY.timings == {"supermask": ("events", "sync")}
    assert laboratory.FAMILY.ranks == 1


def test_a_mode_that_captures_training_steps_is_refused(lab):
    one = case("supermask")
    captured = Laboratory(lab.ranks, Options(mode="graph", ceilings=CEILINGS))
    with pytest.raises(CaseFailed, match=r"timing mode 'graph': block_sparse's supermask is timed"):
        captured.result(one, [one])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["layers", "backward", "planning", "models", "supermask", "quick"])
def test_a_sweep_measures_the_methods_of_its_phase_side_by_side(name, device):
    loaded = sweep.load(name, ["block_sparse"])["block_sparse"]
    for phase in loaded["phases"]:
        found = sweep.cases(loaded, phase, device, 1, {})
        points = {one.point for one in found}
        assert found
        ours = {"bsr", "supermask"}
        assert all(ours & {one.method for one in found if one.point == p} for p in points)
        assert {one.method for one in found} >= {OF_PHASE[phase][0]}


def test_the_sweep_of_layers_has_what_the_verdicts_need():
    loaded = sweep.load("layers", ["block_sparse"])["block_sparse"]
    found = sweep.cases(loaded, "forward", "cuda", 1, {})
    asked_for = {(c.shape, c.block, c.sparsity) for c in found if c.method == "torch_bsr"}
    for shape in ("ViT-B", "ViT-L", "ViT-H"):
        for part in ("up", "down"):
            for block in (32, 64):
                for sparsity in (0.8, 0.9):
                    assert (f"{shape} {part}", block, sparsity) in asked_for
    lines = {c.sparsity for c in found if c.N == 8192 and c.block == 64 and c.method == "bsr"}
    assert lines == {0.6, 0.8, 0.9, 0.95}


def test_a_share_is_given_on_the_command_line_as_a_number():
    assert sweep.parse_set(["sparsity=0.5,0.8"], "block_sparse") == {"sparsity": [0.5, 0.8]}
    assert asked.ranks(["block_sparse"]) == 1


@pytest.mark.slow
def test_the_bench_file_measures_the_quick_sweep(bench, tmp_path):
    file = tmp_path / "r.json"
    out = bench("--results", str(file), files=("bench/bench_block_sparse.py",))
    out.assert_outcomes(passed=21)
    ids = [entry["extra_info"]["id"] for entry in json.loads(file.read_text())["benchmarks"]]
    assert "block_sparse_planning/plan-N192-K128-B48-b16-s0.8-fp32" in ids
