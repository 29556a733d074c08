"""The same interface on ranks that torchrun started: on one node, on two, and when one fails."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    "TORCHELASTIC_RUN_ID" in os.environ, reason="torchrun is not started inside torchrun"
)

FUNCTIONS = """
import os, threading, time
import torch, torch.distributed as dist
from blockshock.distributed import RankFailure, note, open_ranks, watch
from blockshock.distributed.ranks import device

def add_up(start):
    x = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(x)
    return dist.get_rank(), x.item(), str(device())

def big():
    return torch.full((5_000_000,), float(dist.get_rank()))

def append(items):
    items.append(dist.get_rank())
    return items

def fail_on(rank, wait):
    if dist.get_rank() == rank:
        note("looking at the shape")
        raise ValueError("N=1000 must be a multiple of 64")
    if wait:
        dist.barrier()

def sleep_on(rank):
    if dist.get_rank() == rank:
        note("sleeping")
        time.sleep(1000)

def lock():
    return threading.Lock()
"""

# A test file, which every rank runs as a whole.
SUITE = """
import pytest

@pytest.fixture(scope="module")
def ranks():
    with open_ranks(2, "cpu", timeout=60) as ranks:
        yield ranks

def test_results_in_rank_order(ranks):
    assert ranks.size == 2
    assert ranks.run(add_up, 1) == [(0, 3, "cpu"), (1, 3, "cpu")]

def test_big_results(ranks):
    assert [x[-1].item() for x in ranks.run(big)] == [0.0, 1.0]

def test_arguments_are_copies(ranks):
    items = []
    assert ranks.run(append, items) == [[0], [1]]
    assert items == []

@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_the_same_on_all_and_is_survived(ranks, failing):
    with pytest.raises(RankFailure) as caught:
        ranks.run(fail_on, failing, wait=False)
    failure = caught.value
    assert str(failure).startswith(f"rank {failing} of 2 raised ValueError: N=1000 must be")
    assert (failure.kind, failure.rank, failure.exc_type) == ("raised", failing, "ValueError")
    assert failure.note == "looking at the shape"
    assert "in fail_on" in failure.detail
    with pytest.raises(RankFailure, match="cannot be pickled"):
        ranks.run(lock)
    assert ranks.run(add_up, 1) == [(0, 3, "cpu"), (1, 3, "cpu")]

def test_another_size_is_refused(ranks):
    with pytest.raises(ValueError, match="4 ranks were asked for and torchrun started 2"):
        open_ranks(4, "cpu")
    assert open_ranks(None, "cpu").size == 2

def test_missing_gpus_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="found 0 GPUs"):
        open_ranks(2, "cuda")

def test_wrong_use_is_refused(ranks):
    with pytest.raises(ValueError, match="lambda"):
        ranks.run(lambda: 0)
    closed = open_ranks(2, "cpu")
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.run(add_up, 1)
"""

NODES = """
with open_ranks(2, "cpu") as ranks:
    assert ranks.run(add_up, 1) == [(0, 3, "cpu"), (1, 3, "cpu")]
    assert ranks.run(big)[1][0] == 1.0
print("all is well on", os.environ["GROUP_RANK"], flush=True)
"""

# One rank raises, and the other waits for it in a collective.
STUCK = """
def test_stuck(monkeypatch):
    monkeypatch.setattr(watch, "GRACE_SECONDS", 1.0)
    ranks = open_ranks(2, "cpu")
    ranks.run(add_up, 0)
    ranks.run(fail_on, 1, wait=True)
"""

SLEEP = """
watch.GRACE_SECONDS = 5.0
ranks = open_ranks(2, "cpu")
ranks.run(add_up, 0)
ranks.run(sleep_on, 1, timeout=1)
"""


# One rank stands still; the other finds no fault in itself.
STOPPED = """
import signal
from blockshock.distributed import waiting
watch.BEAT_SECONDS, watch.SILENT_SECONDS, waiting.FIRST_SECONDS = 0.5, 3.0, 6.0

def stop_on(rank):
    if dist.get_rank() == rank:
        note("about to stop")
        print("stops:", os.getpid(), flush=True)
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()

ranks = open_ranks(2, "cpu", tell=print)
ranks.run(add_up, 0)
ranks.run(stop_on, 1, timeout=9)
"""

PYTEST = ["-m", "pytest", "-q", "-W", "error", "-c", os.devnull, "-p", "no:cacheprovider"]


def launch(directory, body, *program, nproc=2, launcher=("--standalone",)):
    """Starts torchrun on a file with `body`; no port is fixed."""
    script = directory / "test_inner.py"
    script.write_text(FUNCTIONS + body)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", *launcher),
            *("--nproc-per-node", str(nproc), *program, str(script)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=directory,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{directory}",
            "PYTEST_ADDOPTS": "",
            "OMP_NUM_THREADS": "1",
        },
    )


def finish(process, seconds=60):
    """(exit code, output) of a launcher."""
    with process:
        try:
            out, _ = process.communicate(timeout=seconds)
        finally:
            process.kill()
    return process.returncode, out


def test_a_suite_runs_unchanged_under_torchrun(tmp_path):
    code, out = finish(launch(tmp_path, SUITE, *PYTEST))
    assert code == 0, out
    assert out.count("8 passed") == 2, out
    assert "destroy_process_group" not in out


QUICK = """
from blockshock.phases.session import Laboratory

Laboratory.ceilings = lambda self: {}
Laboratory.result = lambda self, case, neighbours: ([1e-3] * 5, dict(schema=1, id=case.id))
"""


def test_only_the_first_rank_reports_and_writes(tmp_path):
    (tmp_path / "quick_cases.py").write_text(QUICK)  # nothing is measured here
    program = [*PYTEST[:2], "-c", str(ROOT / "pytest.ini"), f"--rootdir={ROOT}", "--device=cpu"]
    program += ["-p", "no:cacheprovider", "-p", "quick_cases", "--set", "N=64", "--set", "B=8"]
    program += ["--results=r.json", "--benchmark-json=b.json", "--junitxml=j.xml"]
    program += ["--benchmark-autosave", f"--benchmark-storage=file://{tmp_path}/saved"]
    code, out = finish(
        launch(tmp_path, "", *program, str(ROOT / "bench" / "bench_linear.py") + "::bench_forward")
    )
    assert code == 0, out
    assert out.count("6 of 6 cases are in r.json") == 1
    assert out.count("[1/6]") == 1
    assert len(list(tmp_path.glob("saved/*/*.json"))) == 1
    assert out.count("Wrote benchmark data in") == 1
    assert out.count("generated xml file") == 1


@pytest.mark.slow
def test_ranks_of_two_nodes_share_nothing_but_the_network(tmp_path):
    # The launchers of two nodes on this host; they find each other, and a free port, by a file.
    launcher = ["--nnodes", "2", "--local-addr", "localhost", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", str(tmp_path / "meeting"), "--rdzv-conf", "store_type=file"]
    directories = [tmp_path / "node0", tmp_path / "node1"]
    for directory in directories:
        directory.mkdir()
    nodes = [launch(directory, NODES, nproc=1, launcher=launcher) for directory in directories]
    ends = [finish(node) for node in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    for node in (0, 1):
        assert sum(out.count(f"all is well on {node}") for _, out in ends) == 1


def test_a_rank_that_raises_ends_a_job_that_waits_for_it(tmp_path):
    # pytest captures what a rank prints; the launcher's report has it all the same
    code, out = finish(launch(tmp_path, STUCK, *PYTEST))
    assert code != 0
    assert "rank 1 of 2 raised ValueError: N=1000 must be a multiple of 64, in fail_on" in out
    assert 'raise ValueError("N=1000 must be a multiple of 64")' in out
    assert "rank 0 of 2 ends with the job" in out
    assert "in barrier" in out


@pytest.mark.slow
def test_a_rank_that_stands_still_is_seen_and_named(tmp_path):
    cause = r"rank 1 without a sign of life for \d+ s .*, in stop_on; the limit is 9 s"
    process, seen = launch(tmp_path, STOPPED), ""
    for line in process.stdout:
        seen += line
        if re.search(cause, line):  # killed here: the launcher gives a stopped rank 30 s to end
            os.kill(int(re.search(r"stops: (\d+)", seen)[1]), signal.SIGKILL)
            break
    code, out = finish(process)
    assert code != 0
    out = seen + out
    said = r"still waiting: rank 0 at the start \(\d s\); rank 1 without a sign of life for \d s "
    assert re.search(
        said + r"\(stopped\?\), last seen at: about to stop; [67] s, ends at 9 s", out
    ), out
    assert re.search(cause, out), out
    assert "rank 0 of 2 did not answer" not in out


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_at_the_deadline(tmp_path):
    code, out = finish(launch(tmp_path, SLEEP))
    assert code != 0
    assert "rank 1 of 2 did not answer within 1 s, in sleep_on, while: sleeping" in out
    assert "time.sleep(1000)" in out
