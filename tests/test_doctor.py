"""`python -m blockshock` says what can run, in words and as JSON, whatever the machine is like."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockshock import __main__ as doctor
from blockshock.measure.capabilities import CAPABILITIES

GIB = 2**30


def run(*arguments, path=None):
    return subprocess.run(
        [sys.executable, "-m", "blockshock", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **({"PATH": path} if path else {})},
        cwd=Path(__file__).parents[1],
        check=False,
    )


@pytest.fixture
def two_gpus():
    """Facts as `examine` gives them on a host of two GPUs."""
    gpu = {"memory_bytes": 140 * GIB, "power_limit_w": 700}
    return {
        "runs_on": "cuda",
        "machine": {
            "version": "0.1.0",
            "system": "Linux 6.8",
            "python": "3.12.3",
            "cpu": "a processor",
            "cpu_cores": 32,
            "torch": "2.11.0",
            "cuda": "13.0",
            "nccl": "2.28.9",
            "cusparselt": "0.8.0",
            "triton": None,
            "kind": "cuda",
            "device": "2x NVIDIA H200",
            "driver": "580.1",
            "gpus": [gpu, gpu | {"power_limit_w": None}],
            "topology": [["X", "NV18"], ["NV18", "X"]],
            "problem": None,
        },
        "clocks": [
            {"sm_mhz": 1980, "power_w": 128.13, "temperature_c": 42},
            {"sm_mhz": None, "power_w": 80, "temperature_c": 40},
        ],
        "no_clocks": None,
        "cuda": {"started": True, "problem": None, "peers": [[True, True], [True, True]]},
        "capabilities": {
            "cuda": {"ok": True, "needed": "a GPU", "found": "2x NVIDIA H200", "skipped": None},
            "triton": {"ok": False, "needed": "Triton", "found": "none", "skipped": "kernels"},
        },
    }


def test_json_and_text_agree_on_this_machine():
    asked = run("--json")
    assert asked.returncode == 0, asked.stderr
    facts = json.loads(asked.stdout)
    assert facts["runs_on"] in ("cuda", "cpu")
    assert list(facts["capabilities"]) == list(CAPABILITIES)
    for name, have in facts["capabilities"].items():
        assert have["ok"] == (have["skipped"] is None), name
    assert doctor.show(facts).startswith("Block-Shock ")


def test_every_capability_says_what_is_skipped_without_it():
    assert set(doctor.SKIPPED) == set(CAPABILITIES)


@pytest.mark.slow
def test_a_hanging_nvidia_smi_does_not_hang_the_doctor(tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nsleep 60\n")
    program.chmod(0o755)
    start = time.monotonic()
    told = run(path=f"{tmp_path}:/usr/bin:/bin")
    assert time.monotonic() - start < 15
    assert told.returncode == 0, told.stderr
    assert "nvidia-smi did not answer in 6 s" in told.stdout


def test_the_text_shows_links_clocks_and_what_is_skipped(two_gpus):
    lines = [" ".join(line.split()) for line in doctor.show(two_gpus).splitlines()]
    for expected in (
        "GPUs 2x NVIDIA H200",
        "memory 140 GiB each",
        "power limit 700 W, unknown",
        "GPU0 X NV18",
        "GPU1 yes yes",
        "clocks GPU0 1980 MHz, 128.1 W, 42 °C",
        "GPU1 unknown, 80 W, 40 °C",
        "yes cuda 2x NVIDIA H200",
        "no triton none",
        "needed: Triton",
        "skipped: kernels",
        "`make test` and `make bench` run here on 2 GPUs. Skipped for want of: triton.",
    ):
        assert expected in lines


def test_one_gpu_has_no_tables_of_links(two_gpus):
    two_gpus["machine"] |= {"topology": [["X"]], "gpus": two_gpus["machine"]["gpus"][:1]}
    two_gpus["cuda"]["peers"] = [[True]]
    text = doctor.show(two_gpus)
    assert "links" not in text
    assert "two gloo ranks of the CPU: a layer is shared by two GPUs" in text
    assert "--ranks 1" in text


def test_a_cuda_that_does_not_start_is_shown_and_the_cpu_remains(two_gpus):
    two_gpus["runs_on"] = "cpu"
    two_gpus["cuda"] = {"started": False, "problem": "driver too old", "peers": None}
    text = doctor.show(two_gpus)
    assert "CUDA does not start: driver too old" in text
    assert "run here on two gloo ranks of the CPU" in text
    assert "their times say nothing about GPUs" in text


def test_the_exit_code_says_whether_anything_can_run(two_gpus, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: two_gpus)
    assert doctor.main([]) == 0
    two_gpus["runs_on"] = None
    assert doctor.main([]) == 1
    assert "Nothing can run here" in capsys.readouterr().out


def test_a_missing_torch_is_one_clear_message(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.main([]) == 1
    assert "needed: torch 2.10 or newer" in capsys.readouterr().err


def test_cuda_is_not_started_behind_a_driver_that_does_not_answer():
    told = doctor.start_cuda(2, "nvidia-smi did not answer in 6 s")
    assert told["problem"] == "not tried: nvidia-smi did not answer in 6 s"
