"""Every linear method computes the dense layer: output, gradients, weight, on all ranks alike."""

import pytest
import torch

from blockshock.linear import METHODS
from blockshock.linear.parts import REDUCES
from tests import linear_jobs as jobs

CUDA = torch.cuda.is_available()


def cases():
    for method, cls in METHODS.items():
        for mask in cls.masks or (None,):
            yield method, {} if mask is None else {"mask": mask}


def identify(value):
    return value.get("mask", "") if isinstance(value, dict) else str(value)


def check(answers):
    for answer in answers:
        assert answer["exact_weight"]
        assert answer["same_bits"]
        assert all(passes for _, passes in answer["ratios"].values()), answer["ratios"]


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
    check(ranks.run(jobs.errors, method, N, N, 192, dtype, **options))


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
    check(ranks.run(jobs.errors, method, 256, 256, 512, "bf16", bias=False))


@pytest.mark.parametrize("mask", ["tile", "magnitude"])
def test_dense_master_matches_dense(ranks, mask):
    check(ranks.run(jobs.errors, "block_shock", 256, 256, 512, "bf16", mask=mask, master="dense"))


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


@pytest.mark.gpus(2)
@pytest.mark.parametrize("where", ["weight_gradient", "product"])
def test_an_exchange_that_failed_in_the_middle_blocks_no_later_one(ranks, where):
    needs(ranks, "cuda")
    options = {"N": 4096, "B": 4096, "reduce": "exchange"}
    for answer in ranks.run(jobs.goes_on_after_a_failure, where, **options, timeout=60):
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


@pytest.mark.parametrize("size", [1, 3])
def test_an_odd_number_of_ranks_is_refused(size):
    for method in ("masked_split", "block_shock", "block_shock_folded"):
        reason = METHODS[method].unsupported(
            192, 192, dtype=torch.bfloat16, device_type="cpu", ranks=size
        )
        assert "even number of ranks" in reason


@pytest.mark.parametrize("upkeep", [True, False], ids=["upkeep", "forgotten"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("block_shock", {"master": "packed"}),
        ("block_shock", {"master": "dense"}),
        ("block_shock_folded", {}),
        ("masked_split", {}),
        ("dense_tp_row", {}),
        ("dense_tp_column", {}),
    ],
)
def test_ten_training_steps_follow_dense(ranks, method, options, optimizer, upkeep):
    on_gpu = ranks.device == "cuda"
    dtype, size = ("bf16" if on_gpu else "fp32"), 64 * ranks.size
    # In bf16 the weights themselves are rounded in each step; a stale or lost part costs far more.
    change, dx = (0.1, 0.02) if on_gpu else (1e-3, 1e-5)
    for fused in (False, True):
        for answer in ranks.run(
            jobs.train, method, 10, optimizer, fused, upkeep, dtype, size, **options
        ):
            assert answer["weight"] < change
            assert answer["dx"] < dx


SUMMED = [method for method, cls in METHODS.items() if hasattr(cls, "reduces")]
# Kernel and mask; "auto" decides by a measured table.
KERNELS = [
    ("cusparselt", "tile"),
    ("cusparselt", "1010"),
    ("thin", "tile"),
    ("thin", "1001"),
    ("thin", "random"),
    ("folded", "1100"),
    ("folded", "1001"),
    ("auto", "1100"),
    ("auto", "tile_magnitude"),
]


def needs(ranks, device):
    if ranks.device != device:
        pytest.skip(f"the ranks are on {ranks.device}")


@pytest.mark.parametrize("master", ["packed", "dense"])
@pytest.mark.parametrize("kernel", ["folded", "auto"])
@pytest.mark.parametrize("mask", ["1100", "1010", "1001"])
def test_folding_block_shock_matches_dense(ranks, mask, kernel, master):
    options = {"mask": mask, "kernel": kernel, "master": master}
    check(ranks.run(jobs.errors, "block_shock", 256, 256, 512, "bf16", **options))
    for told in ranks.run(jobs.paths, "block_shock", 256, 32, "bf16", **options):
        assert told["weight_gradient"] == "dense product of the kept columns"
        if master == "dense" and kernel == "auto":  # as with PyTorch's own 2:4 tensors
            assert "expanded term" in told["backward"]
            continue
        assert told["backward"] == "dense product with the kept columns, gathered"
        if kernel == "folded" or ranks.device == "cpu":
            assert told["forward"] == "dense product of the kept columns"


@pytest.mark.parametrize("master", ["packed", "dense"])
def test_folding_training_steps_follow_dense(ranks, master):
    on_gpu = ranks.device == "cuda"
    dtype, size = ("bf16" if on_gpu else "fp32"), 64 * ranks.size
    change, dx = (0.1, 0.02) if on_gpu else (1e-3, 1e-5)
    options = {"mask": "1010", "kernel": "folded", "master": master}
    for answer in ranks.run(
        jobs.train, "block_shock", 10, "Adam", True, False, dtype, size, **options
    ):
        assert answer["weight"] < change
        assert answer["dx"] < dx


def test_what_the_cpu_cannot_do_is_refused_with_the_value_and_the_fix(ranks):
    needs(ranks, "cpu")
    size = 32 * ranks.size
    for kernel in ("thin", "cusparselt"):
        for text in ranks.run(jobs.refusal, "block_shock", 64, size, "bf16", kernel=kernel):
            assert kernel in text
            assert "use 'auto'" in text
    for method in SUMMED:
        for how in ("exchange", "two_shot"):
            for text in ranks.run(jobs.refusal, method, 64, size, "bf16", reduce=how):
                assert how in text
                assert "use 'collective'" in text


@pytest.mark.parametrize("mask", ["tile", "tile_magnitude", "random", "magnitude"])
def test_a_mask_that_cannot_be_folded_is_refused_with_those_that_can(ranks, mask):
    size = 32 * ranks.size
    answers = ranks.run(jobs.refusal, "block_shock", 64, size, "bf16", mask=mask, kernel="folded")
    for text in answers:
        assert mask in text
        assert "1100, 1010, 1001" in text


def test_unknown_kernels_and_sums_are_refused_with_the_known_ones(ranks):
    size = 32 * ranks.size
    for text in ranks.run(jobs.refusal, "block_shock", 64, size, "bf16", kernel="dense"):
        assert "'dense'" in text
        assert all(name in text for name in METHODS["block_shock"].kernels)
    for method in SUMMED:
        for text in ranks.run(jobs.refusal, method, 64, size, "bf16", reduce="ring"):
            assert "'ring'" in text
            assert all(name in text for name in REDUCES)


@pytest.mark.parametrize("method", SUMMED)
@pytest.mark.parametrize("how", ["auto", "collective"])
def test_the_sums_that_every_device_has_match_dense(ranks, method, how):
    check(ranks.run(jobs.errors, method, 256, 256, 512, "bf16", reduce=how))
    for told in ranks.run(jobs.paths, method, 256, 32, "bf16", reduce=how):
        if ranks.device == "cpu":
            words = "collective" + (" (the ranks have no GPUs)" if how == "auto" else "")
            assert told.get("reduce", words) == told.get("reduce_backward", words) == words


@pytest.mark.gpus(2)
@pytest.mark.parametrize("B", [192, 1536])
@pytest.mark.parametrize("how", REDUCES)
@pytest.mark.parametrize(("kernel", "mask"), KERNELS)
def test_every_kernel_with_every_sum_matches_dense(ranks, kernel, mask, how, B):
    needs(ranks, "cuda")
    options = {"kernel": kernel, "mask": mask, "reduce": how}
    check(ranks.run(jobs.errors, "block_shock", 4096, 4096, B, "bf16", **options))


@pytest.mark.gpus(2)
@pytest.mark.parametrize("B", [192, 1536])
@pytest.mark.parametrize("how", REDUCES)
@pytest.mark.parametrize("method", [method for method in SUMMED if method != "block_shock"])
def test_every_method_with_every_sum_matches_dense(ranks, method, how, B):
    needs(ranks, "cuda")
    check(ranks.run(jobs.errors, method, 4096, 4096, B, "bf16", reduce=how))


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    ("kernel", "mask", "dtype"), [("thin", "tile", "fp16"), ("folded", "1010", "fp16")]
)
def test_kernels_and_exchange_match_dense_in_fp16_and_with_a_dense_master(
    ranks, kernel, mask, dtype
):
    needs(ranks, "cuda")
    options = {"kernel": kernel, "mask": mask, "reduce": "exchange"}
    for master in ("packed", "dense"):
        check(
            ranks.run(jobs.errors, "block_shock", 1024, 1024, 192, dtype, master=master, **options)
        )


@pytest.mark.gpus(2)
@pytest.mark.parametrize(("B", "lead"), [(1, (1,)), (5, (5,)), (63, (7, 9))])
@pytest.mark.parametrize("how", ["two_shot", "exchange"])
@pytest.mark.parametrize(("kernel", "mask"), [("thin", "tile"), ("folded", "1100")])
def test_few_rows_match_dense_by_every_kernel_and_sum(ranks, kernel, mask, how, B, lead):
    needs(ranks, "cuda")
    options = {"kernel": kernel, "mask": mask, "reduce": how}
    answers = ranks.run(
        jobs.errors, "block_shock", 320, 64 * ranks.size, B, "bf16", lead=lead, **options
    )
    for answer in answers:
        assert answer["exact_weight"]
        assert answer["same_bits"]
        assert all(ratio < 3 for ratio, _ in answer["ratios"].values()), answer["ratios"]


@pytest.mark.gpus(2)
@pytest.mark.parametrize("B", [64, 1536])
@pytest.mark.parametrize("how", ["collective", "two_shot", "exchange"])
@pytest.mark.parametrize(("kernel", "mask"), [("thin", "tile"), ("folded", "1100")])
def test_a_captured_step_follows_its_inputs(ranks, kernel, mask, how, B):
    needs(ranks, "cuda")
    options = {"kernel": kernel, "mask": mask, "reduce": how}
    for error in ranks.run(jobs.captured, "block_shock", 1024, B, "bf16", **options):
        assert error < torch.finfo(torch.bfloat16).eps / 4


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    ("kernel", "mask", "words"),
    [
        ("thin", "tile", "thin 2:4 kernel"),
        ("cusparselt", "tile", "cuSPARSELt, algorithm"),
        ("folded", "1100", "dense product of the kept columns"),
    ],
)
def test_paths_say_the_kernel_and_the_sum_that_were_asked_for(ranks, kernel, mask, words):
    needs(ranks, "cuda")
    for how in ("exchange", "collective", "two_shot"):
        options = {"kernel": kernel, "mask": mask, "reduce": how}
        for B in (64, 4096):
            for told in ranks.run(jobs.paths, "block_shock", 1024, B, "bf16", **options):
                assert words in told["forward"]
                assert "unknown" not in told["forward"]  # an exchange multiplies chunks of the rows
                assert how in told["reduce"]
