"""The block-sparse kernels compile for an H200, on any machine, into what their plans expect."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")

ROOT = Path(__file__).parents[1]
SHARED = 227 * 1024  # bytes of a program


@pytest.mark.slow
def test_the_kernels_compile_for_an_h200_and_fit_it():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default of Triton 3.6, and not of 3.10
    command = [sys.executable, "-m", "tests.compile_block_sparse"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 27
    for made in found:
        kernel, block, *_ = made["case"]
        assert made["shared"] <= SHARED, made
        assert made["stack"] <= (256 if kernel == "gelu" else 0), made  # bytes of a thread
        if kernel in ("product", "gelu", "transposed") or (kernel == "gradient" and block >= 64):
            assert made["products"] > 0, made  # of the matrix units, in groups of warps
            assert not made["alone"], made  # each of them waits for the one before it
