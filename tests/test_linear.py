"""Every linear method computes the dense layer: output, gradients, weight, on all ranks alike."""

import pytest
import torch

from blockshock.linear import METHODS, parts
from tests import linear_jobs as jobs


def cases():
    for method, cls in METHODS.items():
        for mask in cls.masks or (None,):
            yield method, {} if mask is None else {"mask": mask}


def identify(value):
    return value.get("mask", "") if isinstance(value, dict) else str(value)


def skip_unsupported(ranks, method, N, K, dtype):
    reason = METHODS[method].unsupported(
        N, K, dtype=jobs.DTYPES[dtype], device_type=ranks.device, ranks=ranks.size
    )
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("method", "options"), list(cases()), ids=identify)
def test_output_and_gradients_match_dense(ranks, method, options, dtype):
    N = 4096 if ranks.device == "cuda" else 256
    skip_unsupported(ranks, method, N, N, dtype)
    jobs.check(ranks.run(jobs.errors, method, N, N, 192, dtype, **options))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("N", "K", "B", "lead"),
    [(128, 320, 1, (1,)), (320, 128, 63, (7, 9)), (64, 64, 1000, (2, 5, 100)), (192, 256, 5, ())],
)
def test_ugly_shapes_match_dense(ranks, method, N, K, B, lead):
    dtype = "fp32" if ranks.device == "cpu" else "bf16"
    skip_unsupported(ranks, method, N, K, dtype)
    strided = B == 63
    for answer in ranks.run(jobs.errors, method, N, K, B, dtype, lead=lead, strided=strided):
        assert answer["exact_weight"]
        # So few entries are no sample of rounding errors: they allow three times dense's.
        assert all(ratio < 3 for ratio, _ in answer["ratios"].values()), answer["ratios"]


@pytest.mark.parametrize("method", METHODS)
def test_an_input_without_rows_gives_an_output_without_rows(ranks, method):
    size = 64 * ranks.size
    for answer in ranks.run(jobs.empty, method, 64, size):
        assert answer == ((2, 0, 64), (2, 0, size), 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_without_bias_matches_dense(ranks, method):
    skip_unsupported(ranks, method, 256, 256, "bf16")
    jobs.check(ranks.run(jobs.errors, method, 256, 256, 512, "bf16", bias=False))


@pytest.mark.parametrize("mask", ["tile", "1100", "magnitude"])
@pytest.mark.parametrize("master", ["float32", "dense"])
def test_other_masters_match_dense(ranks, mask, master):
    jobs.check(
        ranks.run(jobs.errors, "block_shock", 256, 256, 512, "bf16", mask=mask, master=master)
    )


@pytest.mark.parametrize("mask", ["tile", "1100", "magnitude"])
def test_float32_masters_gather_steps_that_bf16_would_lose(ranks, mask):
    # Each of 64 steps of a 1024th is less than half of bf16's last place, 2⁻⁸ of the value.
    for master, reached in (("float32", 1 + 2**-4), ("packed", 1.0)):
        for answer in ranks.run(jobs.small_steps, mask=mask, master=master):
            assert answer == {"factor": reached, "dtype": "torch.bfloat16"}


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_the_same_bits(ranks, method):
    skip_unsupported(ranks, method, 512, 512, "bf16")
    assert all(ranks.run(jobs.repeated_bits, method, 512, 128, "bf16"))


@pytest.mark.parametrize("damage", [jobs.flip_one_mask_group, jobs.drop_a_term])
def test_the_tolerance_finds_a_wrong_mask_and_a_lost_term(ranks, damage):
    # 64 × 64 so that one group of four among 1024 stands out; fp32 on the CPU, where rounding is
    # far below it.
    dtype = "bf16" if ranks.device == "cuda" else "fp32"
    size = 32 * ranks.size
    answers = ranks.run(
        jobs.errors, "block_shock", size, size, 512, dtype, mask="magnitude", break_it=damage
    )
    assert not all(passes for _, passes in answers[0]["ratios"].values())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dense_single"])
def test_a_second_derivative_is_refused(ranks, method):
    if METHODS[method].unsupported(
        64, 64, dtype=torch.float32, device_type=ranks.device, ranks=ranks.size
    ):
        pytest.skip("float32")
    for text in ranks.run(jobs.second_derivative, method):
        assert text is not None
        assert "once" in text


def test_a_part_without_its_ranks_is_refused():
    layer = METHODS["dense_tp_row"].from_dense(torch.randn(64, 64))
    layer.ranks = 2  # as when it was saved whole by two ranks, and loaded by one process
    with pytest.raises(RuntimeError, match="built by 2 ranks"):
        layer(torch.randn(3, 64))


def test_a_step_after_one_that_failed_in_the_middle_is_right(ranks):
    for answer in ranks.run(jobs.goes_on_after_a_failure, "weight_gradient"):
        assert answer


def test_a_weight_that_is_not_finite_is_refused_with_its_place(ranks):
    for method in METHODS:
        answers = ranks.run(jobs.refusal, method, 128, 128, "bf16", poison=(77, 3))
        held = [answer for answer in answers if answer is not None]
        assert held, method  # column- or row-parallel ranks read only what they hold
        assert all("77" in answer and "3" in answer and "nan" in answer for answer in held)


@pytest.mark.parametrize(
    ("N", "K", "named"), [(100, 128, "100"), (128, 130, "130"), (63, 63, "63")]
)
def test_sizes_that_are_not_multiples_of_64_are_refused(ranks, N, K, named):
    for answer in ranks.run(jobs.refusal, "block_shock", N, K, "bf16"):
        assert named in answer
        assert "64" in answer


def test_a_wrong_mask_or_master_is_refused(ranks):
    N, K = 64, 32 * ranks.size
    assert "1100" in ranks.run(jobs.refusal, "block_shock", N, K, "bf16", mask="0110")[0]
    assert "1100" in ranks.run(jobs.refusal, "masked_split", N, K, "bf16", mask="0110")[0]
    assert "packed" in ranks.run(jobs.refusal, "block_shock", N, K, "bf16", master="sparse")[0]
    answer = ranks.run(jobs.refusal, "block_shock_folded", N, K, "bf16", mask="tile")[0]
    assert "whole columns" in answer


def test_fewer_ranks_are_advised_only_where_they_help():
    assert parts.term_unsupported(250, 2) == "K = 250 is not a multiple of 4; pad it"
    assert parts.term_unsupported(250, 4) == "K = 250 is not a multiple of 8; pad it"
    assert parts.term_unsupported(192, 4, multiple=64).endswith("pad it or use fewer ranks")
    assert parts.term_unsupported(128, 4, multiple=64) is None


@pytest.mark.parametrize("size", [1, 3])
def test_an_odd_number_of_ranks_is_refused(size):
    for method in ("masked_split", "block_shock", "block_shock_folded"):
        reason = METHODS[method].unsupported(
            192, 192, dtype=torch.bfloat16, device_type="cpu", ranks=size
        )
        assert "even number of ranks" in reason


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("block_shock", {"master": "packed"}),
        ("block_shock", {"master": "float32"}),
        ("block_shock", {"master": "dense"}),
        ("block_shock_folded", {}),
        ("masked_split", {}),
        ("dense_tp_row", {}),
        ("dense_tp_column", {}),
    ],
)
def test_ten_training_steps_follow_dense(ranks, method, options, optimizer):
    half = ranks.device == "cuda" or options.get("master") == "float32"
    dtype, size = ("bf16" if half else "fp32"), 64 * ranks.size
    # In bf16 the weights themselves are rounded in each step; a stale or lost part costs far more.
    change, dx = (0.1, 0.02) if half else (1e-3, 1e-5)
    for fused in (False, True):
        for answer in ranks.run(jobs.train, method, 10, optimizer, fused, dtype, size, **options):
            assert answer["weight"] < change
            assert answer["dx"] < dx
