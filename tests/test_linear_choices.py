"""Every kernel and every sum over ranks computes the dense layer; what cannot be had is refused."""

import pytest
import torch

from blockshock.kernels import products
from blockshock.linear import METHODS
from blockshock.linear.parts import REDUCES
from tests import linear_jobs as jobs

SUMMED = [method for method, cls in METHODS.items() if hasattr(cls, "reduces")]
# Kernel and mask; "auto" decides by a measured table.
KERNELS = [
    ("cusparselt", "tile"),
    ("cusparselt", "1010"),
    ("thin", "tile"),
    ("thin", "1001"),
    ("thin", "random"),
    ("wide", "tile"),
    ("wide", "random"),
    ("folded", "1100"),
    ("folded", "1001"),
    ("auto", "1100"),
    ("auto", "tile_magnitude"),
]


def needs(ranks, device, kernel="auto"):
    if ranks.device != device:
        pytest.skip(f"the ranks are on {ranks.device}")
    reason = products.unsupported(kernel, torch.bfloat16, device)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("master", ["packed", "float32", "dense"])
@pytest.mark.parametrize("kernel", ["folded", "auto"])
@pytest.mark.parametrize("mask", ["1100", "1010", "1001"])
def test_folding_block_shock_matches_dense(ranks, mask, kernel, master):
    options = {"mask": mask, "kernel": kernel, "master": master}
    jobs.check(ranks.run(jobs.errors, "block_shock", 256, 256, 512, "bf16", **options))
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
    for answer in ranks.run(jobs.train, "block_shock", 10, "Adam", True, dtype, size, **options):
        assert answer["weight"] < change
        assert answer["dx"] < dx


def test_what_the_cpu_cannot_do_is_refused_with_the_value_and_the_fix(ranks):
    needs(ranks, "cpu")
    size = 32 * ranks.size
    for kernel in ("thin", "wide", "cusparselt"):
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
    jobs.check(ranks.run(jobs.errors, method, 256, 256, 512, "bf16", reduce=how))
    for told in ranks.run(jobs.paths, method, 256, 32, "bf16", reduce=how):
        if ranks.device == "cpu":
            words = "collective" + (" (the ranks have no GPUs)" if how == "auto" else "")
            assert told.get("reduce", words) == told.get("reduce_backward", words) == words


@pytest.mark.gpus(2)
@pytest.mark.parametrize("B", [192, 1536])
@pytest.mark.parametrize("how", REDUCES)
@pytest.mark.parametrize(("kernel", "mask"), KERNELS)
def test_every_kernel_with_every_sum_matches_dense(ranks, kernel, mask, how, B):
    needs(ranks, "cuda", kernel)
    options = {"kernel": kernel, "mask": mask, "reduce": how}
    jobs.check(ranks.run(jobs.errors, "block_shock", 4096, 4096, B, "bf16", **options))


@pytest.mark.gpus(2)
@pytest.mark.parametrize("B", [192, 1536])
@pytest.mark.parametrize("how", REDUCES)
@pytest.mark.parametrize("method", [method for method in SUMMED if method != "block_shock"])
def test_every_method_with_every_sum_matches_dense(ranks, method, how, B):
    needs(ranks, "cuda")
    jobs.check(ranks.run(jobs.errors, method, 4096, 4096, B, "bf16", reduce=how))


@pytest.mark.gpus(2)
@pytest.mark.parametrize("how", REDUCES)
@pytest.mark.parametrize(
    ("kernel", "mask"),
    [("cusparselt", "tile"), ("thin", "random"), ("wide", "tile"), ("folded", "1100")],
)
def test_a_layer_on_another_gpu_than_the_current_one_matches_dense(ranks, kernel, mask, how):
    needs(ranks, "cuda", kernel)
    options = {"kernel": kernel, "mask": mask, "reduce": how}
    jobs.check(ranks.run(jobs.elsewhere, "block_shock", 4096, 4096, 1536, "bf16", **options))


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    ("kernel", "mask", "dtype"),
    [("thin", "tile", "fp16"), ("wide", "tile", "fp16"), ("folded", "1010", "fp16")],
)
def test_kernels_and_exchange_match_dense_in_fp16_and_with_a_dense_master(
    ranks, kernel, mask, dtype
):
    needs(ranks, "cuda", kernel)
    options = {"kernel": kernel, "mask": mask, "reduce": "exchange"}
    for master in ("packed", "dense"):
        jobs.check(
            ranks.run(jobs.errors, "block_shock", 1024, 1024, 192, dtype, master=master, **options)
        )


@pytest.mark.gpus(2)
@pytest.mark.parametrize(("B", "lead"), [(1, (1,)), (5, (5,)), (63, (7, 9))])
@pytest.mark.parametrize("how", ["two_shot", "exchange"])
@pytest.mark.parametrize(
    ("kernel", "mask"), [("thin", "tile"), ("wide", "tile"), ("folded", "1100")]
)
def test_few_rows_match_dense_by_every_kernel_and_sum(ranks, kernel, mask, how, B, lead):
    needs(ranks, "cuda", kernel)
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
@pytest.mark.parametrize(
    ("kernel", "mask"), [("thin", "tile"), ("wide", "tile"), ("folded", "1100")]
)
def test_a_captured_step_follows_its_inputs(ranks, kernel, mask, how, B):
    needs(ranks, "cuda", kernel)
    options = {"kernel": kernel, "mask": mask, "reduce": how}
    for error in ranks.run(jobs.captured, "block_shock", 1024, B, "bf16", **options):
        assert error < torch.finfo(torch.bfloat16).eps / 4


@pytest.mark.gpus(2)
@pytest.mark.parametrize(
    ("kernel", "mask", "words"),
    [
        ("thin", "tile", "thin 2:4 kernel"),
        ("wide", "tile", "wide 2:4 kernel"),
        ("cusparselt", "tile", "cuSPARSELt, algorithm"),
        ("folded", "1100", "dense product of the kept columns"),
    ],
)
def test_paths_say_the_kernel_and_the_sum_that_were_asked_for(ranks, kernel, mask, words):
    needs(ranks, "cuda", kernel)
    for how in ("exchange", "collective", "two_shot"):
        options = {"kernel": kernel, "mask": mask, "reduce": how}
        for B in (64, 4096):
            for told in ranks.run(jobs.paths, "block_shock", 1024, B, "bf16", **options):
                assert words in told["forward"]
                assert "unknown" not in told["forward"]  # an exchange multiplies chunks of the rows
                assert how in told["reduce"]


@pytest.mark.gpus(2)
@pytest.mark.parametrize("where", ["weight_gradient", "product"])
def test_an_exchange_that_failed_in_the_middle_blocks_no_later_one(ranks, where):
    needs(ranks, "cuda")
    options = {"N": 4096, "B": 4096, "reduce": "exchange"}
    for answer in ranks.run(jobs.goes_on_after_a_failure, where, **options, timeout=60):
        assert answer
