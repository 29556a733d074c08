"""The attention kernels compile for an H200, on any machine, into what their plans expect."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")

ROOT = Path(__file__).parents[1]
REGISTERS, SHARED, RESERVED = 65536, 227 * 1024, 1024  # of a processor; shared memory of a program


def test_the_kernels_compile_for_an_h200_and_fit_it():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_attention"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 9
    for made in found:
        assert made["stack"] <= 32, made  # bytes of spilled registers of a thread
        assert not made["alone"], made  # each product waits for the one before it
        if made["warps"] == 4:  # two programs to a processor, which hide each other's waiting
            assert 2 * 4 * 32 * made["registers"] <= REGISTERS, made
            assert 2 * (made["shared"] + RESERVED) <= SHARED + RESERVED, made
