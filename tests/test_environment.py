"""What is read about the machine is true, complete, plain data, and never costs the session."""

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from blockshock.measure import environment, nvidia_smi
from blockshock.measure.capabilities import CAPABILITIES, capabilities, why_not

# Two GPUs as a driver of the 580 series prints them: an underlined header, tabs, NICs beside.
GPUS = {
    "index": ["0", "1"],
    "uuid": [
        "GPU-aaaa1111-0000-0000-0000-000000000000",
        "GPU-bbbb2222-0000-0000-0000-000000000000",
    ],
    "name": ["NVIDIA H200", "NVIDIA H200"],
    "memory.total": ["143771", "143771"],
    "power.limit": ["700.00", "[N/A]"],
    "clocks.max.sm": ["1980", "1980"],
    "compute_cap": ["9.0", "9.0"],
    "driver_version": ["580.159.04", "580.159.04"],
    "clocks.sm": ["1980", "345"],
    "power.draw": ["128.13", "[Unknown Error]"],
    "temperature.gpu": ["42", "40"],
}
LINKS = (
    "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tPIX\t0-31\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\t0-31\t0\t\tN/A\n"
    "NIC0\tPIX\tSYS\t X \t\t\t\t\n"
    "\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
)
PEERS = (
    " \t\x1b[4mGPU0\tGPU1\t\x1b[0m\n GPU0\tX\tOK\t\n GPU1\tOK\tX\t\n"
    "\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n"
)
REAL = f"""
    import sys
    first, *rest = sys.argv[1:]
    if first == "topo":
        print({{"-m": {LINKS!r}, "-p2p": {PEERS!r}}}[rest[0]], end="")
    else:
        fields = first.removeprefix("--query-gpu=").split(",")
        for i in range(2):
            print(", ".join({GPUS!r}[field][i] for field in fields))
"""
HANG = "import subprocess; subprocess.run(['sleep', '60'])"  # a wrapper: its child must end too
BROKEN = {
    "garbage": ("print('\\x00\\xff not, a table')", "cannot be read"),
    "failing": (
        "import sys; print('NVIDIA-SMI has failed: no driver'); sys.exit(9)",
        "exit code 9: NVIDIA-SMI has failed: no driver",
    ),
    "silent failure": ("import sys; sys.exit(3)", "exit code 3: (no output)"),
    "nothing": ("pass", "lists no GPU"),
}


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """smi(source, count=n): `source` runs as nvidia-smi (None: there is none); torch sees n."""
    monkeypatch.setattr(nvidia_smi, "_hung", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def no_nvml(index):
        raise ModuleNotFoundError("nvidia-ml-py")

    def install(source, *, count=2):
        if source is None:
            monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        else:
            program = tmp_path / "nvidia-smi"
            program.write_text(f"#!{sys.executable}\n{textwrap.dedent(source)}")
            program.chmod(0o755)
            monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(environment, "gpu_count", lambda: count)
        monkeypatch.setattr(environment, "_clocks_by_nvml", no_nvml)
        capabilities.cache_clear()

    yield install
    capabilities.cache_clear()


def test_describe_holds_the_facts_of_the_gpus(smi):
    smi(REAL)
    facts = environment.describe(ranks=2)
    assert facts["device"] == "2x NVIDIA H200"
    assert facts["kind"] == "cuda"
    assert facts["backend"] == "nccl"
    assert facts["driver"] == "580.159.04"
    assert facts["topology"] == [["X", "NV18"], ["NV18", "X"]]
    assert facts["power_limit_w"] == [700, None]
    assert facts["gpus"][0]["memory_bytes"] == 143771 * 2**20
    assert facts["problem"] is None
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_describe_is_of_the_gpus_that_the_ranks_use(smi, monkeypatch):
    smi(REAL)
    assert environment.describe(ranks=1)["device"] == "1x NVIDIA H200"
    assert environment.describe(kind="cpu", ranks=2)["device"] == "CPU (2 gloo ranks)"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert environment.describe()["power_limit_w"] == [None, 700]


def test_describe_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match=r"'tpu'.*'cuda' and 'cpu'"):
        environment.describe(kind="tpu")


def test_describe_names_every_version_of_the_result_schema():
    facts = environment.describe(kind="cpu", ranks=2)
    assert facts["torch"] == torch.__version__
    assert {"cuda", "driver", "nccl", "cusparselt", "triton", "topology", "version"} <= set(facts)
    assert facts["cpu_cores"] >= 1


@pytest.mark.parametrize(
    ("visible", "rows"),
    [
        ("0,1", ["0", "1"]),
        ("1", ["1"]),
        ("GPU-bbbb,0", ["1", "0"]),
        ("1,7,0", ["1"]),
        ("0,0", ["0"]),
    ],
)
def test_rows_follow_cuda_visible_devices(smi, monkeypatch, visible, rows):
    smi(REAL)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [row["index"] for row in nvidia_smi.visible_gpus("name").rows] == rows


@pytest.mark.parametrize("visible", ["", "-1", "MIG-1234", "GPU-"])
def test_hidden_gpus_are_said_to_be_hidden(smi, monkeypatch, visible):
    smi(REAL)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    rows, problem = nvidia_smi.visible_gpus("name")
    assert rows == []
    assert problem == f"CUDA_VISIBLE_DEVICES={visible!r} names none of the 2 GPUs"


def test_clocks_follow_the_order_asked_for(smi):
    smi(REAL)
    first = {"sm_mhz": 1980, "power_w": 128.13, "temperature_c": 42}
    second = {"sm_mhz": 345, "power_w": None, "temperature_c": 40}
    assert environment.clocks([1, 0]) == [second, first]
    assert environment.why_no_clocks() is None


def test_no_gpu_has_no_clocks(smi):
    smi(REAL, count=0)
    assert environment.clocks([0]) is None
    assert environment.clocks([]) is None
    assert environment.why_no_clocks() == "torch sees no GPU"


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_nvidia_smi_is_a_problem_in_words(smi, fault):
    source, message = BROKEN[fault]
    smi(source)
    facts = environment.describe()
    assert facts["device"] == "2x NVIDIA GPU"
    assert facts["topology"] is None
    assert message in facts["problem"]
    assert environment.clocks([0]) is None
    assert environment.why_no_clocks() == facts["problem"]
    assert not capabilities()["symmetric_memory"].ok


def test_a_missing_nvidia_smi_is_a_problem_in_words(smi):
    smi(None)
    assert environment.describe()["problem"] == "nvidia-smi was not found"


def test_an_unreadable_topology_leaves_the_gpus(smi):
    smi(
        "import sys\nif sys.argv[1] == 'topo':\n    sys.exit(print('no'))\n" + textwrap.dedent(REAL)
    )
    facts = environment.describe()
    assert facts["device"] == "2x NVIDIA H200"
    assert facts["topology"] is None
    assert facts["problem"] == "nvidia-smi topo -m answered what cannot be read"


def test_a_hanging_nvidia_smi_costs_its_timeout_once(smi):
    smi(HANG)
    start = time.monotonic()
    assert nvidia_smi.query("name", timeout=0.5).problem == "nvidia-smi did not answer in 0.5 s"
    for _ in range(20):
        assert environment.clocks([0]) is None
    assert time.monotonic() - start < 3
    assert environment.describe()["problem"] == "nvidia-smi did not answer in 0.5 s"


def test_capabilities_of_two_linked_gpus(smi):
    smi(REAL)
    can = capabilities()
    assert can["cuda"].ok
    assert can["two_gpus"] == (True, "two GPUs", "2x NVIDIA H200")
    assert can["symmetric_memory"].found == "2x NVIDIA H200, peer access OK"
    assert can["symmetric_memory"].ok


def test_peers_that_cannot_reach_each_other_have_no_symmetric_memory(smi):
    smi(REAL.replace("OK\\t\\n", "CNS\\t\\n"))
    can = capabilities()["symmetric_memory"]
    assert not can.ok
    assert "peer access CNS, OK" in can.found


def test_a_build_without_cuda_beside_gpus_says_what_to_install(smi, monkeypatch):
    smi(REAL, count=0)
    monkeypatch.setattr(torch.version, "cuda", None)
    ok, _, found = capabilities()["cuda"]
    assert not ok
    assert found.endswith("a build without CUDA, beside 2x NVIDIA H200: install the CUDA build")


def test_a_cuda_build_that_sees_no_gpu_says_so(smi, monkeypatch):
    smi(REAL, count=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "for CUDA 13.0, which sees none of 2x NVIDIA H200" in capabilities()["cuda"].found
    smi(None, count=0)
    assert "for CUDA 13.0, and no GPU: nvidia-smi was not found" in why_not("cuda")


def test_an_old_gpu_cannot_run_two_of_four(smi, monkeypatch):
    smi(REAL.replace("'9.0'", "'7.5'"))
    versions = environment.versions() | {"cusparselt": "0.8.0"}
    monkeypatch.setattr(environment, "versions", lambda: versions)
    assert not capabilities()["cusparselt"].ok
    smi(REAL)
    assert capabilities()["cusparselt"].ok


def test_every_capability_gives_a_reason_or_none(smi):
    smi(None, count=0)
    assert set(CAPABILITIES) == set(capabilities())
    for name, (ok, needed, found) in capabilities().items():
        assert why_not(name) == (None if ok else f"needs {needed}; found {found}")
    with pytest.raises(ValueError, match="'warp'; there are gloo, cuda, two_gpus"):
        why_not("warp")


def test_reading_the_machine_starts_no_cuda():
    code = """
        import torch
        from blockshock.measure import environment
        from blockshock.measure.capabilities import capabilities
        environment.describe(), environment.clocks([0]), capabilities()
        assert not torch.cuda.is_initialized()
    """
    program = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(program, check=True, timeout=60, cwd=Path(__file__).parents[1])


def test_the_commit_is_that_of_the_checkout_and_unknown_without_one(monkeypatch, tmp_path):
    found = environment.commit()
    assert found is None or (len(found["id"]) == 40 and found["dirty"] in (True, False))
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "blockshock/measure/x.py"))
    assert environment.commit() is None
    (tmp_path / ".git").touch()  # git refuses it
    assert environment.commit() is None
