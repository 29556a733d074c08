"""The attention kernels compile for an H200, on any machine, into what their plans expect."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")

ROOT = Path(__file__).parents[1]
SHARED, RESERVED = 227 * 1024, 1024  # bytes of a processor, and what each program takes besides


@pytest.mark.slow
def test_the_kernels_compile_for_an_h200_and_fit_it():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default of Triton 3.6, and not of 3.10
    command = [sys.executable, "-m", "tests.compile_attention"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 10
    assert found.pop()["stack"] == 0  # of the merge of pieces, which multiplies nothing
    for made in found:
        assert made["stack"] <= 32, made  # bytes of spilled registers of a thread
        assert made["products"] > 0, made  # of the matrix units, in groups of warps
        assert not made["alone"], made  # each of them waits for the one before it
        if made["warps"] == 4:  # two programs to a processor, which hide each other's waiting
            assert 2 * (made["shared"] + RESERVED) <= SHARED + RESERVED, made
