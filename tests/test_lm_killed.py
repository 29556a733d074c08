"""Runs killed at random steps and resumed, one process and two ranks; a signal to one rank."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from blockshock.lm.__main__ import main
from tests import lm_runs
from tests.lm_runs import assert_same_run, finish, start, write

STEPS = 200
OPTIONS = {"train__steps": STEPS, "train__checkpoint_every": 7, "train__evaluate_batches": 2}


def logged(folder):
    """The last step in the log."""
    try:
        return int(lm_runs.rows(folder)[-1][0])
    except (OSError, IndexError, ValueError, TypeError):  # no row yet, or half of one
        return 0


def reach(process, folder, step, seconds=120):
    """Waits until the log has this step."""
    end = time.monotonic() + seconds
    while logged(folder) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"step {step} was not reached"
        time.sleep(0.02)


def children(process):
    """The processes that torchrun started."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(word) for word in text.split()]


def kill(config, folder, first, ranks=1, more=()):
    """Runs the command and kills a rank of it at a random step from `first` on."""
    step = first + random.randrange(STEPS // 4)
    process = start("train", "--config", config, *more, ranks=ranks)
    reach(process, folder, step)
    os.kill(random.choice(children(process)) if ranks > 1 else process.pid, signal.SIGKILL)
    code, out = finish(process)
    assert code != 0, f"killed at step {step}: {out}"


@pytest.mark.slow
def test_a_run_killed_at_random_steps_ends_with_the_same_bits(tmp_path, one_thread):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["--config", str(write(whole, **OPTIONS))]) == 0
    config = write(killed, **OPTIONS)
    assert main(["prepare", "--config", str(config)]) == 0
    kill(config, killed, 8)
    kill(config, killed, STEPS // 2, more=["--resume"])
    assert main(["train", "--config", str(config), "--resume"]) == 0
    assert_same_run(killed, whole)


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_end_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, out = finish(start("--config", write(whole, **OPTIONS), ranks=2))
    assert code == 0, out
    assert "2 ranks (overlapped)" in out
    config = write(killed, **OPTIONS)
    assert main(["prepare", "--config", str(config)]) == 0
    kill(config, killed, STEPS // 3, ranks=2)
    code, out = finish(start("train", "--config", config, "--resume", ranks=2))
    assert code == 0, out
    assert_same_run(killed, whole)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    config = write(tmp_path, **OPTIONS)
    process = start("--config", config, ranks=2)
    reach(process, tmp_path, 20)
    os.kill(children(process)[1], signal.SIGTERM)
    code, out = finish(process)
    assert code == 0, out
    assert f"of {STEPS}, checkpoint in" in out
    assert 20 <= logged(tmp_path) < STEPS
