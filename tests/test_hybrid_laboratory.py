"""The hybrid block in the laboratory: what is measured, what is checked, and what is refused."""

import json

import pytest
import torch

from bench import asked, sweep
from blockshock.attention import METHODS, patterns, work
from blockshock.measure.errors import relative_error
from blockshock.phases.engine import Options
from blockshock.phases.session import Laboratory
from blockshock.phases.transformer import by_rows
from tests.hybrid_laboratory_jobs import case, wrong

CEILINGS = {
    "matrix_flops": {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11},
    "copy_bytes_per_s": 1e10,
    "link_bytes_per_s": 1e9,
}
FORWARD = {"attention", "output"}
BACKWARD = (
    FORWARD
    | {"gradient"}
    | {
        f"grad_{name}"
        for name in ("x", "attention_norm", "qkv", "out", "mlp_norm", "gate_up", "down")
    }
)


@pytest.fixture(scope="module")
def lab(ranks):
    return Laboratory(ranks, Options(rounds=3, seconds=0.01, ceilings=CEILINGS))


@pytest.mark.parametrize(
    ("phase", "dtype"),
    [("hybrid_forward", "fp32"), ("hybrid_backward", "fp32"), ("hybrid_backward", "bf16")],
)
def test_both_attentions_pass_their_check_and_are_measured_side_by_side(lab, phase, dtype):
    backward = phase == "hybrid_backward"
    point = [case(phase, method, dtype=dtype) for method in ("dense_attention", "sparse_attention")]
    for one in point:
        samples, info = lab.result(one, point)
        assert len(samples) == 3
        assert len(info["timing"]["interleaved_with"]) == 1
        assert set(info["errors"]) == (BACKWARD if backward else FORWARD)
        regions = {"attention", "mlp", "allreduce", "forward", "total"}
        assert set(info["regions"]) == regions | ({"backward"} if backward else set())
        assert info["regions"]["allreduce"]["calls"] == (4 if backward else 2)
        attention = "reference" if one.pattern else "flash_torch"
        if lab.ranks.device == "cpu":
            assert info["paths"] == {"attention": attention, "reduce": "collective"}
        tokens = one.batch * one.T
        assert min(samples) <= tokens / info["rates"]["tokens_per_s"] <= max(samples)
    sparse, dense = (lab.result(one, point)[1]["work"] for one in reversed(point))
    assert dense["pairs"] == 2 * 4 * 37 * 38 // 2
    assert sparse["pairs"] == work.pairs(patterns.band(8), True, 37, 37, 2, 4)
    assert sparse["projection_flops"] == dense["projection_flops"]
    weights = 4 * 64**2 + 3 * 64 * 256
    assert dense["projection_flops"] == (6 if backward else 2) * 2 * 37 * weights / 2
    both = "both" if backward else "forward"
    assert dense["attention_flops"] == work.flops(both, dense["pairs"], 16) / 2


@pytest.mark.parametrize(
    ("phase", "kind"),
    [
        ("hybrid_forward", "window"),
        ("hybrid_forward", "causal"),
        ("hybrid_forward", "a rank's weight"),
        ("hybrid_backward", "gradient"),
        ("hybrid_backward", "1% too long"),
        ("hybrid_backward", "half a norm's gradient"),
    ],
)
def test_the_check_fails_where_a_part_is_wrong(ranks, phase, kind):
    dtype = "bf16" if kind in ("1% too long", "half a norm's gradient") else "fp32"
    assert all(all(passes.values()) for passes in ranks.run(wrong, phase, "nothing", dtype))
    assert not any(all(passes.values()) for passes in ranks.run(wrong, phase, kind, dtype))


PATTERNS = {
    "none": None,
    "window": patterns.band(5),
    "blocks": patterns.random_blocks(8, 0.3),  # with rows that attend to nothing
    "blocks_per_head": patterns.random_blocks(8, 0.3, per_head=True),
    "batch": patterns.from_mask(torch.rand(2, 3, 61, 61) < 0.2),
}


@pytest.mark.parametrize("scores", [2**27, 2000], ids=["together", "in parts"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_by_rows_is_the_reference(monkeypatch, pattern, causal, scores):
    monkeypatch.setattr(by_rows, "SCORES", scores)
    drawn = torch.Generator().manual_seed(0)
    found = []
    q, k, v, d_out = torch.randn(4, 2, 3, 61, 8, generator=drawn, dtype=torch.float64)
    for attend in (METHODS["reference"], by_rows.attend):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, causal=causal, pattern=PATTERNS[pattern])
        found.append((out, *torch.autograd.grad(out, inputs, d_out)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_parts_cost_no_more_in_bf16_than_one_product():
    drawn = torch.Generator().manual_seed(0)
    q, k, v, d_out = torch.randn(4, 1, 1, 600, 8, generator=drawn, dtype=torch.float64)

    def gradient(attend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, causal=True, pattern=None)
        found = torch.autograd.grad(out, inputs, d_out.to(dtype))
        return torch.stack(found).double()

    true = gradient(by_rows.attend, torch.float64)
    errors = [
        relative_error(gradient(attend, torch.bfloat16), true)
        for attend in (by_rows.attend, METHODS["reference"])
    ]
    assert errors[0] < 1.05 * errors[1]


def test_names_tell_cases_apart():
    assert case().id == "transformer_hybrid_backward/sparse_attention-band(8)-64x1-H4-B2-T37-fp32"
    assert case(causal=False).point_label == "64x1-H4-B2-T37-fp32-causal=False"
    assert case().point == case(method="dense_attention").point
    assert case(pattern="band( 8 )").id == case().id
    assert case(pattern=None).pattern == "band(1024)"
    assert case().mask is patterns.band(8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "tp"}, "hybrid_backward does not measure tp; use one of dense_attention,"),
        ({"pattern": "bend(4)"}, r"pattern 'bend\(4\)' must be a builder"),
        ({"method": "dense_attention", "pattern": "band(4)"}, "dense_attention takes none"),
    ],
)
def test_a_case_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        case(**changed)


def test_what_cannot_run_is_told_before_it_is_run():
    assert case().unsupported("cpu") is None
    assert "heads = 4 is no multiple of 8 ranks" in case(ranks=8).unsupported("cpu")
    assert "needs GPUs" in case(reduce="exchange").unsupported("cpu")
    assert "D = 4" in case(width=16, dtype="bf16").unsupported("cuda")


@pytest.mark.parametrize("name", ["hybrid", "hybrid_sparsity", "hybrid_scaling"])
def test_sweeps_of_the_block_can_run_on_two_ranks(name):
    loaded = sweep.load(name, ["transformer"])["transformer"]
    for device in ("cpu", "cuda"):
        for phase in ("hybrid_forward", "hybrid_backward"):
            found = sweep.cases(loaded, phase, device, 2, {})
            assert {one.method for one in found} == {"dense_attention", "sparse_attention"}
            assert all(one.unsupported(device) is None for one in found)
    assert asked.BENCHES["hybrid"] == "transformer"


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ranks")
def test_the_bench_file_measures_its_sweep(bench, tmp_path):
    file = tmp_path / "r.json"
    out = bench("--sweep", "hybrid", "--results", str(file), files=("bench/bench_hybrid.py",))
    out.assert_outcomes(passed=8)
    ids = [entry["extra_info"]["id"] for entry in json.loads(file.read_text())["benchmarks"]]
    assert "transformer_hybrid_forward/sparse_attention-band(8)-64x1-H4-B1-T61-fp32" in ids
