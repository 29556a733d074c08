"""The block-sparse kernels compile for an H200, on any machine, into what their plans expect."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")

ROOT = Path(__file__).parents[1]
SHARED = 227 * 1024  # bytes of a program; `stack`: bytes of a thread


@pytest.mark.slow
def test_every_plan_compiles_for_an_h200_and_fits_it():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default of Triton 3.6, and not of 3.10
    command = [sys.executable, "-m", "tests.compile_block_sparse"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    of_lists = {"_count_and_fill", "_count", "_fill"}
    kernels = {"product", "gelu", "transposed", "gradient"}
    assert {made["case"][0] for made in found} == kernels | of_lists
    for made in found:
        kernel, block, *_ = made["case"]
        assert made["shared"] <= SHARED, made
        assert made["stack"] <= {"gelu": 256, "_count_and_fill": 32}.get(kernel, 0), made
        if kernel in kernels and (kernel != "gradient" or block >= 64):
            assert made["products"] > 0, made  # of the matrix units, in groups of warps
            if made["products"] > 2:  # of fewer a loop's waits do not tell
                assert not made["alone"], made  # each of them waits for the one before it
