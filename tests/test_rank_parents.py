"""Ranks do not outlive their parent, however it is started and however it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.rank_jobs import is_gone, wait_until

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    "TORCHELASTIC_RUN_ID" in os.environ, reason="under torchrun there is no pool to test"
)

# Two pools at once: one is closed, the other forgotten. It says when each of its steps is done.
PARENT = """
import os, sys, time
import torch.distributed as dist
from blockshock.distributed import Ranks

def pid():
    return os.getpid()

def hang():
    if dist.get_rank() == 0:
        print("hanging", flush=True)
        time.sleep(1000)
    dist.barrier()

if __name__ == "__main__":
    closed, forgotten = Ranks(1, device="cpu"), Ranks(2, device="cpu")
    print(*closed.run(pid), *forgotten.run(pid), flush=True)
    closed.close()
    try:
        forgotten.run(hang)
    except KeyboardInterrupt:
        print(*forgotten.run(pid), flush=True)
"""


@contextlib.contextmanager
def parent(tmp_path):
    """The program while its ranks hang: (its process, their numbers, its temporary files)."""
    script, scratch = tmp_path / "parent.py", tmp_path / "tmp"
    script.write_text(PARENT)
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-W", "error", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests in the background may ignore SIGINT, and then a child would as well.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
    )
    with process:
        try:
            pids = process.stdout.readline().split()
            assert len(pids) == 3
            assert process.stdout.readline() == "hanging\n"
            yield process, pids, scratch
        finally:
            process.kill()


def test_an_interrupt_ends_the_run_and_the_end_is_silent(tmp_path):
    with parent(tmp_path) as (process, pids, scratch):
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C: all in the terminal's foreground
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")
        assert len(out.split()) == 2  # the next run had new ranks
        assert set(out.split()).isdisjoint(pids)
        assert wait_until(lambda: all(is_gone(p) for p in [*pids, *out.split()]))
        assert list(scratch.iterdir()) == []


def test_ranks_and_their_files_go_when_the_parent_is_killed(tmp_path):
    with parent(tmp_path) as (process, pids, scratch):
        process.kill()
        assert process.communicate(timeout=30) == ("", "")
        assert wait_until(lambda: all(is_gone(p) for p in pids))
        assert wait_until(lambda: list(scratch.iterdir()) == [])


@pytest.mark.parametrize(
    "start", ["pytest", pytest.param("-m pytest -n 2", marks=pytest.mark.slow)]
)
def test_ranks_import_test_modules_however_pytest_is_started(tmp_path, start):
    (tmp_path / "test_inner.py").write_text(
        textwrap.dedent(
            """
            def rank():
                import torch.distributed as dist
                return dist.get_rank()

            def test_inner():
                from blockshock.distributed import Ranks
                with Ranks(2, device="cpu") as ranks:
                    assert ranks.run(rank) == [0, 1]
            """
        )
    )
    program, *rest = start.split()
    command = (
        [sys.executable, program] if program == "-m" else [Path(sys.executable).with_name(program)]
    )
    done = subprocess.run(
        [
            *command,
            *rest,
            "-p",
            "no:benchmark",
            "-q",
            "-W",
            "error",
            "-c",
            os.devnull,
            "--rootdir",
            tmp_path,
            tmp_path,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
