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
    "another swizzle": ("(half ^ (matrix_row >> 1 & 3))", "(half ^ (matrix_row & 3))"),
    "a piece of Y is written before it was read": ("if (thread == 0) wait_read<1>();", ""),
    "a piece of Y is copied before all have written it": (
        "fence_copies();\n                group_wait(group);",
        "fence_copies();",
    ),
    "the last pieces of Y are not waited for": ("if (thread == 0) wait_written();", ""),
    "the last stage of a tile is free while a product reads it": (
        "wait_products<0>();\n            release_last();",
        "release_last();\n            wait_products<0>();",
    ),
    "a block ends before the other": ("__syncwarp();\n    cluster_wait();", ""),
    "another band": ("tile - first * columns", "tile - first * rows"),
}


def built(source, folder, tile=wide24.TILES[0]):
    """The program of a kernel."""
    (folder / "wide24.cu").write_text(source, encoding="utf-8")
    constants = wide24.macros(torch.bfloat16, True, tile) | {"BAND": BAND}
    constants["SHARED_BYTES"] = tile.shared_bytes
    command = ["nvcc", "-x", "c++", "-O2", "-std=c++20", "-w", "-I", folder, "-o", folder / "run"]
    command += [f"-D{key}={value}" for key, value in constants.items()]
    subprocess.run([*command, f"{__file__.rpartition('/')[0]}/wide_simulator.cpp"], check=True)
    return folder / "run"


def problem(program, N, K, B, clusters, late, seed):
    """None where the product is exact, else what is wrong. All sums of the data are exact."""
    torch.manual_seed(seed)
    dense, x, bias = (torch.randint(-2, 3, size).bfloat16() for size in ((N, K), (B, K), (N,)))
    mask = masks.make("random", dense, seed=seed)
    codes, file = masks.encode(mask), program.with_name("data")
    given = (x, pack.gather_kept(dense, codes), wide24.arrange_places(codes), bias)
    file.write_bytes(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in given))
    words = [str(word) for word in (program, file, N, K, B, clusters, late, seed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    if done.returncode:
        return done.stdout or f"exit {done.returncode}"
    y = torch.frombuffer(bytearray(file.read_bytes()[-2 * B * N :]), dtype=torch.bfloat16)
    exact = (x.double() @ (dense * mask).double().t() + bias.double()).bfloat16()
    return None if torch.equal(y.view(B, N), exact) else "another product"


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
