"""Attention in the laboratory: what is checked, what is told, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from blockshock.attention import METHODS, patterns, peers, rules
from blockshock.attention.reference import reference
from blockshock.distributed import Ranks
from blockshock.phases import engine, session
from blockshock.phases.attention import problem as attention_problem
from blockshock.phases.attention.case import BUILDERS, AttentionCase, parse_pattern
from blockshock.phases.attention.figures import figures
from blockshock.phases.attention.problem import AttentionProblem
from blockshock.phases.attention.steps import forward_backward
from blockshock.phases.engine import Options
from blockshock.phases.session import CaseFailed, Laboratory
from tests.attention_checks import DEVICE

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
FIGURES = {"output", "grad_q", "grad_k", "grad_v"}


@pytest.fixture(scope="module")
def one_rank():
    with Ranks(1, device="cuda" if torch.cuda.is_available() else "cpu") as pool:
        yield pool


@pytest.fixture(scope="module")
def lab(one_rank):
    return Laboratory(one_rank, Options(rounds=5))


def make(phase="forward", method="reference", batch=2, heads=2, Tq=48, D=16, **options):
    return AttentionCase(phase, method, batch, heads, Tq, D, **{"dtype": "fp32", **options})


def beside(case, *methods):
    return [replace(case, method=method) for method in methods]


# What may go wrong with a method, each in one way.


def no_scale(q, k, v, *, causal=False, pattern=None, scale=None):
    return reference(q, k, v, causal=causal, pattern=pattern, scale=1.0)


def half_precision(q, k, v, **mask):
    return reference(*(x.bfloat16() for x in (q, k, v)), **mask).to(q.dtype)


def wrong_grad_q(q, k, v, **mask):
    fixed = q.detach()
    return reference(fixed + 0.9 * (q - fixed), k, v, **mask)


def refuses(q, k, v, **mask):
    raise ValueError("D = 16: this one takes D of 17 only")


def no_memory(q, k, v, **mask):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.")


FAULTS = {f.__name__: f for f in (no_scale, half_precision, wrong_grad_q, refuses, no_memory)}
MEASURE_POINT = engine.measure_point


def measure_point(cases, options):
    """engine.measure_point in a rank that knows the faulty methods."""
    METHODS.update(FAULTS)
    return MEASURE_POINT(cases, options)


@pytest.fixture
def faults(monkeypatch):
    for name, method in FAULTS.items():
        monkeypatch.setitem(METHODS, name, method)
    monkeypatch.setattr(engine, "measure_point", measure_point)


@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
def test_a_result_says_everything_the_schema_promises(lab, phase):
    point = beside(make(phase, causal=True, kv_heads=1, tier="tiny"), "reference", "flash_torch")
    samples, info = lab.result(point[1], point)
    both = phase == "forward_backward"
    assert len(samples) == 5
    assert all(math.isfinite(sample) and sample > 0 for sample in samples)
    assert info["schema"] == session.SCHEMA
    assert info["id"] == f"attention_{phase}/flash_torch-B2-H2over1-T48-D16-fp32-causal"
    assert info["case"] == point[1].as_dict()
    assert (info["case"]["family"], info["case"]["tier"]) == ("attention", "tiny")
    assert info["timing"]["interleaved_with"] == ["reference"]
    assert set(info["errors"]) == (FIGURES if both else {"output"})
    assert all(f["ratio"] <= f["limit"] for f in info["errors"].values())
    assert set(info["regions"]) == {"forward", "total"} | ({"backward"} if both else set())
    assert info["truth"] == "float64"
    entries = 2 * 2 * 48 * 16, 2 * 1 * 48 * 16  # of q, of k
    assert info["memory"]["input_bytes"] == 4 * ((1 + both) * entries[0] + 2 * entries[1])
    pairs = 2 * 2 * 48 * 49 // 2
    moved = (1 + both) * 4 * 2 * sum(entries)
    assert info["work"] == {
        "pairs": pairs,
        "flops": (14 if both else 4) * pairs * 16,
        "bytes": moved,
    }
    median = sorted(samples)[2]
    assert info["rates"]["tokens_per_s"] == pytest.approx(2 * 48 / median)
    assert info["rates"]["tflops"] == pytest.approx(info["work"]["flops"] / median / 1e12)
    assert info["rates"]["limit_fraction"] == pytest.approx(info["floor"]["seconds"] / median)
    assert 0 < info["rates"]["matrix_fraction"] <= info["rates"]["limit_fraction"]
    assert (info["pattern"], info["paths"], info["usual"]) == (None, {}, {})


def test_halves_pass_within_their_own_rounding(lab):
    case = make("forward_backward", dtype="bf16", Tq=100, Tk=60, causal=True)
    _, info = lab.result(
        *(beside(case, "flash_torch")[0], beside(case, "reference", "flash_torch"))
    )
    assert all(1e-4 < f["dense_relative"] < 1e-2 for f in info["errors"].values())
    assert all(f["limit"] < 1.7 for f in info["errors"].values())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("no_scale", "output: relative error .* is wrong|is wrong, so it is not timed: output"),
        ("half_precision", "is wrong, so it is not timed: output"),
        ("wrong_grad_q", "is wrong, so it is not timed: grad_q: relative error 0.1 "),
        ("refuses", "D = 16: this one takes D of 17 only"),
        ("no_memory", "out of memory while building"),
    ],
)
def test_a_faulty_method_is_named_and_not_timed_and_its_neighbours_are(
    one_rank, lab, faults, fault, told
):
    lab.ceilings()
    point = beside(make("forward_backward"), "reference", fault, "flash_torch")
    fresh = Laboratory(one_rank, lab.options)
    with pytest.raises(CaseFailed, match=told):
        fresh.result(point[1], point)
    for case in (point[0], point[2]):
        assert fault not in fresh.result(case, point)[1]["timing"]["interleaved_with"]


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "rectangular": {"causal": True, "Tk": 23},
    "wide": {"causal": True, "Tq": 23, "Tk": 48},
    "grouped": {"kv_heads": 2, "heads": 6},
    "band": {"pattern": "band(5)"},
    "both": {"pattern": "strided(7,3)", "causal": True, "kv_heads": 1, "heads": 3},
    "empty_rows": {"pattern": "random_blocks(8,0.2)"},
}


@pytest.mark.parametrize(
    ("mask", "scores"),
    [
        *((mask, scores) for mask in MASKS for scores in (2**25, 1000)),
        *((mask, 300) for mask in ("causal", "grouped", "both")),  # cut inside a head's rows
    ],
)
def test_the_truth_is_the_reference_in_float64_however_it_is_cut(monkeypatch, mask, scores):
    monkeypatch.setattr(attention_problem, "SCORES", scores)
    case = make(**MASKS[mask])
    check_truth(AttentionProblem(case, CPU), case.mask, case.causal)


@pytest.mark.parametrize("scores", [2**25, 2000, pytest.param(100, marks=pytest.mark.slow)])
def test_patterns_of_each_batch_entry_and_head_are_cut_where_they_are(monkeypatch, scores):
    monkeypatch.setattr(attention_problem, "SCORES", scores)
    problem = AttentionProblem(make(batch=3, heads=4, kv_heads=2, Tq=20), CPU)
    problem.pattern = patterns.predicate(
        lambda b, h, i, j: (i + 2 * j + 3 * b + 5 * h) % 4 != 0,
        "mixed",
        per_batch=True,
        per_head=True,
    )
    check_truth(problem, problem.pattern, False)


def check_truth(problem, pattern, causal):
    wide = [x.double().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = reference(*wide, causal=causal, pattern=pattern)
    wanted = out, *torch.autograd.grad(out, wide, problem.d_out.double())
    for (truth, yardstick, scale), expected in zip(
        (problem.output, *problem.gradients), wanted, strict=True
    ):
        torch.testing.assert_close(truth, expected, rtol=1e-10, atol=1e-12)
        assert 1e-9 < yardstick < 1e-5
        assert abs(scale) < yardstick / 3


class Largest(TorchDispatchMode):
    """Keeps how many entries the largest tensor has."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x.numel() for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.entries = max([self.entries, *made])
        return out


@pytest.mark.parametrize(
    "pattern",
    [
        "band(16)",
        pytest.param("causal_band(40)", marks=pytest.mark.slow),
        pytest.param("random_blocks(64,0.1)", marks=pytest.mark.slow),
    ],
)
def test_a_long_pattern_is_checked_and_counted_without_its_mask(monkeypatch, pattern):
    T, device = 512, torch.device(DEVICE)
    chunk = "CHUNK_CPU" if DEVICE == "cpu" else "CHUNK"
    for module, name in ((attention_problem, "SCORES"), (rules, chunk), (peers, "CHUNK")):
        monkeypatch.setattr(module, name, 64 * T)
    case = make("forward_backward", "block_sparse", batch=1, heads=2, Tq=T, pattern=pattern)
    with Largest() as largest:
        problem = AttentionProblem(case, device)
        told = figures(case, case.function, problem, None, None)
        checked = forward_backward(case, case.function, problem).check()
        peers.block_mask(case.mask, problem.shape, causal=False, device=device)
    assert all(figure.passes for figure in checked.values())
    assert set(checked) == FIGURES
    exact = mask_of(case.mask, T)
    assert told["work"]["pairs"] == 2 * int(exact.sum())
    assert largest.entries <= peers.SIDE * T  # a row of FlexAttention's blocks; the mask has 4


def mask_of(pattern, T):
    """bool [T, T]."""
    zero, token = torch.zeros((), dtype=torch.int64), torch.arange(T)
    return patterns.evaluate(pattern, zero, zero, token[:, None], token)


def test_the_same_data_is_drawn_for_every_method_phase_and_mask():
    q = AttentionProblem(make(), CPU).q
    for other in ({"phase": "forward_backward"}, {"method": "flex"}, {"pattern": "band(5)"}):
        assert torch.equal(AttentionProblem(make(**other), CPU).q, q)
    assert not torch.equal(AttentionProblem(make(seed=1), CPU).q, q)


@pytest.mark.parametrize("method", ["reference", "block_sparse", "block_sparse_unpruned"])
def test_a_pattern_is_told_with_its_tiles_where_the_method_has_some(method):
    case = make(method=method, Tq=256, pattern="band(16)")
    told = figures(case, case.function, AttentionProblem(case, CPU), None, None)["pattern"]
    attended = sum(min(256, i + 17) - max(0, i - 16) for i in range(256))
    assert told["name"] == "band(16)"
    assert told["sparsity"] == pytest.approx(1 - attended / 256**2)
    assert told["ideal_speedup"] == pytest.approx(256**2 / attended)
    if method == "reference":
        assert set(told) == {"name", "sparsity", "ideal_speedup"}
        return
    assert told["table_seconds"] > 0
    assert told["table_bytes"] > 0
    assert min(told["block_q"], told["block_k"]) >= 16
    if method == "block_sparse":
        assert 0 < told["touched_sparsity"] < told["sparsity"]
        assert 1 < told["touched_ideal_speedup"] < told["ideal_speedup"]
    else:
        assert (told["touched_sparsity"], told["touched_ideal_speedup"]) == (0.0, 1.0)


def test_the_floor_is_the_larger_of_arithmetic_and_memory():
    case = make("forward_backward", causal=True)
    ceilings = {"matrix_flops": {"fp32": 1e9}, "copy_bytes_per_s": 1e9}
    told = figures(case, case.function, AttentionProblem(case, CPU), None, ceilings)
    work, floor = told["work"], told["floor"]
    assert floor["compute"] == work["flops"] / 1e9
    assert floor["memory"] == work["bytes"] / 1e9
    assert floor["seconds"] == max(floor["compute"], floor["memory"])


def test_what_cannot_run_is_told_before_it_is_run():
    assert "use --ranks 1" in make(ranks=2).unsupported("cpu")
    assert make().unsupported("cpu") is None
    assert "up to 2^31" in make(heads=16, Tq=16384).unsupported("cuda")
    assert "CUDA only" in make(method="sdpa_flash").unsupported("cpu")
    assert "band(5)" in make(method="flash_torch", pattern="band(5)").unsupported("cpu")
    assert "backward" in make("forward_backward", "flex").unsupported("cpu")


def test_names_tell_cases_apart():
    varied = [
        make(), make(causal=True), make(pattern="band(5)"), make(pattern="band(6)"), make(D=32),
        make(Tk=24), make(kv_heads=1), make(batch=3), make(heads=4), make(Tq=49), make(seed=1),
        make(dtype="fp16"), make(method="flex"), make("forward_backward"),
    ]  # fmt: skip
    assert len({case.id for case in varied}) == len(varied)
    assert make(pattern="global_band(8, 16)").id == make(pattern="global_band(8,16)").id
    assert make(tier="small").id == make().id
    assert make(Tk=48, kv_heads=2) == make()
    assert make(method="flex").point == make(method="flash_torch").point != make(D=32).point


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "flash"}, "unknown method 'flash'; use one of reference"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"family": "linear"}, "unknown family 'linear'"),
        ({"Tq": 0}, "Tq = 0 must be a whole number, 1 or more"),
        ({"heads": True}, "heads = True must be a whole number"),
        ({"causal": 1}, "causal = 1 must be true or false"),
        ({"tier": 3}, "tier = 3 must be text"),
        ({"pattern": 3}, "pattern = 3 must be text"),
    ],
)
def test_a_case_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_pattern_is_read_from_its_text():
    assert parse_pattern("band(256)", 64) is patterns.band(256)
    assert parse_pattern("random_blocks( 64, 0.1 )", 64) is patterns.random_blocks(64, 0.1)
    assert parse_pattern("documents(20)", 50) is patterns.documents([20, 20, 10])
    assert parse_pattern("documents(20,5)", 50) is patterns.documents([20, 5, 20, 5])


@pytest.mark.parametrize(
    "text",
    [
        "band", "band(", "bands(3)", "band(-1)", "band(1.5)", "band(1, 2, 3)", "band(True)",
        "band('3')", "band([3])", "band(window=3)", "band(print(3))", "both(band(1),band(2))",
        "__import__('os')", "patterns.band(3)", "band(3);band(4)", "documents()", "documents(0)",
        "(lambda: 3)()", "", "predicate(3)",
    ],
)  # fmt: skip
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError):
        parse_pattern(text, 64)


def test_every_builder_that_takes_numbers_can_be_named():
    numbers = {"full": "", "causal": "", "strided": "4,2", "global_band": "4,2"}
    numbers |= {"random_blocks": "16,0.5"}
    for name in BUILDERS:
        case = make(pattern=f"{name}({numbers.get(name, 8)})")
        assert patterns.sparsity(case.mask, 48, 48) <= 1


@pytest.fixture
def bench(pytester):
    """Runs `pytest bench/bench_attention.py` on the CPU, inside this process."""

    def run(*args, path="bench/bench_attention.py"):
        return pytester.runpytest_inprocess(
            "-c", ROOT / "pytest.ini", f"--rootdir={ROOT}", "-p", "no:cacheprovider",
            "--device=cpu", "--rounds=3", ROOT / path, *args,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_the_bench_file_alone_is_measured_on_one_rank_and_recorded(bench, tmp_path):
    chosen = ("--set", "method=reference,flash_torch", "--set", "Tq=16", "--set", "Tk=16")
    out = bench(*chosen, "--results", tmp_path / "r.json")
    out.assert_outcomes(passed=14, skipped=2)
    out.stdout.fnmatch_lines(["*flash_torch-*band(16)*skipped: pattern band(16)*"])
    saved = json.loads((tmp_path / "r.json").read_text())
    assert "UNSERIALIZABLE" not in json.dumps(saved)
    for entry in saved["benchmarks"]:
        assert entry["extra_info"]["case"]["family"] == "attention"
        assert entry["extra_info"]["case"]["ranks"] == 1
        assert entry["extra_info"]["case"]["tier"] is None
        assert entry["group"].startswith("attention_forward")


def test_each_family_that_is_asked_has_its_own_sweep_of_that_name(bench):
    both = bench("--collect-only", "-q", "--ranks=1", path="bench").stdout.str()
    assert "bench_attention.py::bench_forward_backward[reference-B1-H1-T64-D32-fp32]" in both
    assert "bench_linear.py::bench_forward[dense_single-N256-B16-bf16]" in both


def test_a_family_that_cannot_be_measured_is_left_out_and_said(bench):
    out = bench("--collect-only", path="bench")
    out.stdout.fnmatch_lines(
        ["attention is left out: it is measured on 1 rank, and 2 run; use pytest *bench_attention*"]
    )
    assert "bench_attention.py>" not in out.stdout.str()
    out = bench("--collect-only", "--ranks=1", "--sweep=patterns", path="bench")
    out.stdout.fnmatch_lines(["linear is left out: no sweep patterns is of this family"])
    assert out.ret == 0


def test_settings_choose_the_families_that_know_them(bench):
    out = bench("--collect-only", "--ranks=1", "--set", "N=64", path="bench")
    out.stdout.fnmatch_lines(["attention is left out: --set N=64: unknown key 'N'; known: D, *"])
    assert out.ret == 0
    out = bench("--collect-only", "--ranks=1", "--set", "method=flex", path="bench")
    out.stdout.fnmatch_lines(["linear is left out: unknown method 'flex'; known: dense_single, *"])
    wrong = bench("--collect-only", "--ranks=1", "--set", "n=64", path="bench")
    wrong.stderr.fnmatch_lines(["*linear is left out: --set n=64: unknown key 'n'*"])
    assert wrong.ret == pytest.ExitCode.USAGE_ERROR


def test_a_family_that_is_asked_alone_and_cannot_be_measured_is_refused_with_the_fix(bench):
    out = bench("--ranks=2", "-k", "causal")
    out.stderr.fnmatch_lines(["*attention *measured on 1 rank, and 2 run; *--ranks 1"])
    assert out.ret == pytest.ExitCode.USAGE_ERROR


def test_a_phase_that_the_family_does_not_have_is_refused_before_it_is_measured(lab):
    case = make("backward")
    with pytest.raises(CaseFailed, match="unknown phase 'backward'; use one of forward, forward_b"):
        lab.result(case, [case])
