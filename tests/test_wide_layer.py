"""`kernel="wide"` in a layer: right operands, never stale ones, and taken where it was measured.

Without a GPU a stand-in multiplies by the kernel's own operands (`wide_jobs`).
"""

import pytest
import torch

from blockshock import masks
from blockshock.kernels import products, thin24, wide24
from blockshock.packed import Packed24
from tests import follow_jobs, graph_jobs, linear_jobs
from tests import wide_jobs as jobs

CUDA = torch.device("cuda")
LAYERS = [
    {"mask": "tile"},
    {"mask": "random"},
    {"mask": "1010"},
    {"mask": "tile_magnitude", "loads": "tile"},
    {"mask": "tile", "master": "float32"},
    {"mask": "tile", "master": "dense"},
    {"mask": "magnitude", "master": "dense"},
]


@pytest.fixture
def on_cpu(ranks):
    """The ranks, where they have no GPUs: there the kernel itself is tested."""
    if ranks.device != "cpu":
        pytest.skip(f"the ranks are on {ranks.device}")
    return ranks


@pytest.fixture
def on_hopper(ranks):
    """The ranks, where they can run the kernel."""
    if reason := products.unsupported("wide", torch.bfloat16, ranks.device):
        pytest.skip(reason)
    return ranks


def packed(N=128, K=192, pattern="tile"):
    weight = torch.randn(N, K, dtype=torch.float64)
    return Packed24.pack(weight, masks.make(pattern, weight))


def test_the_stand_in_puts_the_matrix_together_again():
    form = packed(pattern="random")
    assert torch.equal(jobs.codes_of(wide24.arrange_places(form.codes)), form.codes)


@pytest.mark.parametrize("mask", ["tile", "random"])
@pytest.mark.parametrize("B", [1, 65, 300])
def test_output_and_gradients_match_dense(on_cpu, mask, B):
    answers = on_cpu.run(jobs.errors, 192, 64 * on_cpu.size, B, "fp32", mask=mask)
    linear_jobs.check([found for found, _ in answers])
    for _, rows in answers:
        assert rows == [B] * (2 if mask == "tile" else 1)  # dX is 2:4 as well


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("options", LAYERS, ids=lambda o: "-".join(o.values()))
def test_the_kernel_multiplies_what_the_parameter_holds_whatever_happened(on_cpu, options, seed):
    for error, deeds, products_made in on_cpu.run(jobs.lives, options, seed):
        assert error < 8, deeds  # in units of the dtype's rounding
        assert products_made > 20


@pytest.mark.gpus(2)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("options", LAYERS, ids=lambda o: "-".join(o.values()))
def test_the_kernel_itself_multiplies_what_the_parameter_holds(on_hopper, options, seed):
    options = options | {"kernel": "wide"}
    for error, deeds in on_hopper.run(follow_jobs.lives, options, seed):
        assert error < 8, deeds  # in units of the dtype's rounding


@pytest.mark.gpus(2)
@pytest.mark.parametrize("master", ["packed", "float32", "dense"])
@pytest.mark.parametrize("mask", ["tile", "magnitude"])
def test_captured_steps_and_evaluations_follow_what_was_trained(on_hopper, mask, master):
    options = {"mask": mask, "master": master, "kernel": "wide"}
    for errors in on_hopper.run(graph_jobs.captured, "block_shock", options):
        assert all(error < 0.02 for error in errors.values()), errors
    for same, moved in on_hopper.run(
        graph_jobs.evaluation_between_training, "block_shock", options
    ):
        assert same < 1e-6
        assert moved > 0.01
    found = on_hopper.run(graph_jobs.eager_after_a_capture, "block_shock", options)
    for trained in (True, False):
        found += on_hopper.run(graph_jobs.loaded_after_a_capture, "block_shock", options, trained)
    assert all(error < 1e-6 for error in found)


def test_bytes_count_the_places():
    form = packed()
    before = form.nbytes
    with jobs.stand_in():
        form.product(torch.randn(8, 192, dtype=torch.float64), None, "wide")
    assert form.nbytes == before + 128 * 192 // 8


def test_places_are_not_made_inside_a_capture(monkeypatch):
    form, x = packed(), torch.randn(8, 192, dtype=torch.float64)
    with jobs.stand_in():
        for question in ("is_available", "is_current_stream_capturing"):
            monkeypatch.setattr(torch.cuda, question, lambda: True)
        with pytest.raises(RuntimeError, match="no places of this mask yet"):
            form.product(x, None, "wide")


def test_the_kernel_is_a_candidate_where_it_runs_and_never_the_rule(monkeypatch):
    for kernel in (thin24, wide24):
        monkeypatch.setattr(kernel, "unsupported", lambda dtype, device_type: None)

    def found(rows, kernel="auto", mask="free"):
        return products.candidates(kernel, mask, rows, torch.bfloat16, CUDA)

    assert found(64) == ("thin", "cusparselt")
    assert found(65) == found(512) == ("cusparselt", "thin", "wide")
    assert found(513) == ("cusparselt", "wide")
    assert found(4096, mask="columns") == ("folded", "cusparselt", "wide")
    assert found(1, "wide") == ("wide",)
    monkeypatch.setattr(wide24, "unsupported", lambda dtype, device_type: "another GPU")
    assert found(4096) == ("cusparselt",)
    assert products.unsupported("wide", torch.bfloat16, "cuda") == "another GPU"


FAST = {"cusparselt; collective": 1.0, "wide; collective": 0.8}
SLOW = {"cusparselt; collective": 1.0, "wide; collective": 1.1}


@pytest.mark.parametrize(("times", "best"), [(FAST, "wide"), (SLOW, "cusparselt")])
def test_auto_takes_it_where_it_was_the_fastest(on_cpu, tmp_path, times, best):
    for answers in on_cpu.run(jobs.chosen, tmp_path, times):
        assert [a["way"] for a in answers] == [f"{best}; collective"] * 2
        assert {a["source"] for a in answers} == {"measured"}


@pytest.fixture
def pair(on_hopper):
    """Two ranks that reach each other's memory."""
    if on_hopper.size != 2:
        pytest.skip("by tiles two ranks add")
    return on_hopper


# Rows that fill no tile, one, and many; columns and rows of W in part of a cluster.
SUMS = [(64, 64, 128), (704, 960, 333), (4160, 1088, 1000), (1024, 4096, 2048), (8192, 8192, 512)]


@pytest.mark.gpus(2)
@pytest.mark.parametrize("seed", range(3))
def test_sums_by_tiles_have_the_bits_of_the_products_added(pair, seed):
    assert pair.run(jobs.sums, SUMS, seed) == [[]] * 2


@pytest.mark.gpus(2)
def test_sums_by_tiles_in_graphs_and_out_of_them_keep_step(pair):
    assert pair.run(jobs.captured_sums) == [[]] * 2


@pytest.mark.gpus(2)
@pytest.mark.parametrize("mask", ["tile", "random"])
def test_a_layer_that_sums_by_tiles_matches_dense(pair, mask):
    answers = pair.run(jobs.errors_by_tiles, 704, 1920, 333, "bf16", mask=mask)
    linear_jobs.check([found for found, _ in answers])
    assert all(any(by_tiles) for _, by_tiles in answers)
