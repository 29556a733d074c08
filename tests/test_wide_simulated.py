"""`wide24.cu` on the CPU, by `wide_simulator.cpp`: products are exact, and faults are found."""

import shutil
import subprocess

import pytest
import torch

from blockshock import masks
from blockshock.kernels import nvrtc, pack, wide24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of a CUDA toolkit"),
]
SOURCE = (nvrtc.FOLDER / "wide24.cu").read_text(encoding="utf-8")

BAND = 2  # tiles of W, so that few make more than one band
# (N, K, B): one block; ragged tiles of both, more of them than clusters and bands, rows of X in the
# last piece of a tile, more blocks than stages.
SIZES = [(64, 64, 1), (704, 576, 500)]

# The first two: a tile, and several, so short that a GPU may be ahead of the other by a sum.
SUM_SIZES = [(256, 64, 100), (448, 64, 400), (320, 704, 1)]

# What is wrong: the text of the kernel and what is put in its place.
FAULTS = {
    "a stage is free while a product reads it": (
        "const int last = stage == 0 ? STAGES - 1 : stage - 1;",
        "const int last = stage;",
    ),
    "a stage is fetched too early": ("wait(empty + stage * 8, turn ^ 1);", ""),
    "a stage is read before it is full": ("wait(full + stage * 8, turn);", ""),
    "the other block is not told": (
        "if (lane < CLUSTER) arrive(empty + last * 8, lane)",
        "if (lane == 0) arrive(empty + last * 8, rank)",
    ),
    "a product too many is in flight": ("wait_products<1>", "wait_products<2>"),
    "a set is loaded while a product reads it": ("step(a[1], block + 1)", "step(a[0], block + 1)"),
    "two rows of W in each other's place": (
        "const bool swap = lane % 4 / 2;",
        "const bool swap = 0;",
    ),
    "another swizzle": ("(half ^ (matrix_row >> 1 & 3))", "(half ^ (matrix_row & 3))"),
    "the last stage of a tile is free while a product reads it": (
        "wait_products<0>();\n            release_last();",
        "release_last();\n            wait_products<0>();",
    ),
    "a block ends before the other": ("__syncwarp();\n    cluster_wait();", ""),
    "another band": ("tile - first * columns", "tile - first * rows"),
}


SUM_FAULTS = {
    "a tile is added before it was written here": (
        "wait_told(base + TOLD_AT + i * 4, nth + 1);",
        ";",
    ),
    "a tile is added before it was written there": (
        "wait_announced(sum.flags + sum.slot(tile), sum.epoch);",
        "",
    ),
    "a tile is announced before it was written": (
        "for (int i = 0; i < GROUPS; i++) wait_told(base + TOLD_AT + i * 4, nth);",
        "",
    ),
    "a group alone is waited for": (
        "for (int i = 0; i < GROUPS; i++) wait_told(base + TOLD_AT + i * 4, nth);",
        "wait_told(base + TOLD_AT, nth);",
    ),
    "a tile is told before all warps have written it": ("group_wait(group);", ""),
    "one buffer alone": ("epoch % 2 * ", "0 * "),
    "a piece twice": ("piece % GROUPS;", "0;"),
}


def built(source, folder, tile=wide24.TILES[0], *, sums=False):
    """The program of a kernel."""
    (folder / "wide24.cu").write_text(source, encoding="utf-8")
    constants = wide24.macros(torch.bfloat16, True, tile, sums=sums) | {"BAND": BAND}
    constants["SHARED_BYTES"] = tile.shared_bytes
    command = ["nvcc", "-x", "c++", "-O2", "-std=c++20", "-w", "-I", folder, "-o", folder / "run"]
    command += [f"-D{key}={value}" for key, value in constants.items()]
    subprocess.run([*command, f"{__file__.rpartition('/')[0]}/wide_simulator.cpp"], check=True)
    return folder / "run"


def problem(program, N, K, B, clusters, late, seed, *, gpus=1):
    """None where the product is exact, or all sums of two GPUs, else what is wrong. All sums of the
    data are exact."""
    torch.manual_seed(seed)
    given, times = b"", torch.tensor([2, -1, 1] if gpus == 2 else [1]).view(-1, 1, 1)
    exact = 0
    for _ in range(gpus):
        dense, x, bias = (torch.randint(-2, 3, size).bfloat16() for size in ((N, K), (B, K), (N,)))
        mask = masks.make("random", dense, seed=seed)
        codes = masks.encode(mask)
        own = (x, pack.gather_kept(dense, codes), wide24.arrange_places(codes), bias)
        given += b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in own)
        product = x.double() @ (dense * mask).double().t()
        exact += (times * product + bias.double()).bfloat16().double()
    file = program.with_name("data")
    file.write_bytes(given)
    words = [str(word) for word in (program, file, N, K, B, clusters, late, seed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    if done.returncode:
        return done.stdout or f"exit {done.returncode}"
    found = bytearray(file.read_bytes()[len(given) :])
    y = torch.frombuffer(found, dtype=torch.bfloat16).view(gpus, -1, B, N)
    return None if (y == exact.bfloat16()).all() else "another product"


@pytest.mark.parametrize("tile", wide24.TILES)
def test_it_multiplies_exactly_whenever_copies_and_products_end(tile, tmp_path):
    program = built(SOURCE, tmp_path, tile)
    for seed, (N, K, B) in enumerate(SIZES):
        for clusters in (1, 2):
            for late in (0, 1):
                assert problem(program, N, K, B, clusters, late, seed) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tmp_path):
    text, other = FAULTS[fault]
    assert text in SOURCE
    program = built(SOURCE.replace(text, other), tmp_path)
    assert any(problem(program, *SIZES[1], 1, late, seed) for seed in range(8) for late in (0, 1))


@pytest.mark.parametrize("tile", wide24.TILES)
def test_two_gpus_add_exactly_in_whatever_step_they_are(tile, tmp_path):
    program = built(SOURCE, tmp_path, tile, sums=True)
    for seed, (N, K, B) in enumerate(SUM_SIZES):
        for clusters in (1, 2):
            for late in (0, 1):
                assert problem(program, N, K, B, clusters, late, seed, gpus=2) is None


@pytest.mark.parametrize("fault", SUM_FAULTS)
def test_a_fault_of_the_sum_is_found(fault, tmp_path):
    text, other = SUM_FAULTS[fault]
    assert text in SOURCE
    program = built(SOURCE.replace(text, other), tmp_path, sums=True)
    assert any(
        problem(program, *size, 1, late, seed, gpus=2)
        for seed in range(8)
        for late in (0, 1)
        for size in SUM_SIZES[:2]
    )
