"""Runs in processes of their own, killed at random steps and resumed; one process and two ranks."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests import lm_runs
from tests.lm_runs import assert_same_run, finish, start, write

STEPS = 400
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_random_steps_ends_with_the_same_bits(tmp_path, ranks):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, out = finish(start("--config", write(whole, **OPTIONS), ranks=ranks))
    assert code == 0, out
    draw = random.Random()
    config, more = write(killed, **OPTIONS), ()
    for low in (8, STEPS // 3):
        step = draw.randrange(low, low + STEPS // 4)
        process = start("--config", config, *more, ranks=ranks)
        reach(process, killed, step)
        victim = draw.choice(children(process)) if ranks > 1 else process.pid
        os.kill(victim, signal.SIGKILL)
        code, out = finish(process)
        assert code != 0, f"killed at step {step}: {out}"
        more = ("--resume",)
    code, out = finish(start("--config", config, "--resume", ranks=ranks))
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
