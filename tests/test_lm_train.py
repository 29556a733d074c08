"""Training in one process: it learns, it resumes to the bit, and it refuses in one line."""

import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from blockshock.lm import checkpoint, tokens
from blockshock.lm.__main__ import main
from blockshock.runs import files
from tests import lm_parallel_jobs, lm_runs
from tests.lm_runs import assert_same_run, rows, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(write(folder, train__evaluate_every=4)) == 0
    return folder


def run(config, *more):
    return main([*more, "--config", str(config)])


def at_batch(monkeypatch, number, act):
    """Calls `act(batch)` with what the batch of this number, from 1, would be; uses its result."""
    count, original = itertools.count(1), tokens.Batches.at

    def at(self, position):
        found = original(self, position)
        return act(found) if next(count) == number else found

    monkeypatch.setattr(tokens.Batches, "at", at)


def test_without_a_command_all_is_done_once(whole, capsys, tmp_path):
    assert [int(row[0]) for row in rows(whole)] == list(range(1, 13))
    assert [bool(row[3]) for row in rows(whole)] == [step % 4 == 0 for step in range(1, 13)]
    found = json.loads((whole / "run/evaluation.json").read_text())
    assert found["step"] == 12
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    text = (whole / "run/sample.txt").read_text()
    assert text.startswith("def ")
    before = (whole / "run/checkpoint.pt").read_bytes()
    assert run(whole / "config.yaml") == 0
    out = capsys.readouterr().out
    assert "prepared already" in out
    assert "trained already: 12 steps" in out
    assert (whole / "run/checkpoint.pt").read_bytes() == before
    assert (whole / "run/sample.txt").read_text() == text


def test_a_tiny_model_learns_a_tiny_corpus(tmp_path):
    config = write(tmp_path, train__steps=80, train__batch=8, model__width=32)
    assert run(config) == 0
    found = rows(tmp_path)
    first, last = float(found[0][2]), float(found[-1][2])
    assert first == pytest.approx(math.log(280), rel=0.05)  # nothing is known yet
    assert last < 0.3 * first
    assert float(found[-1][3]) < 0.3 * first
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["loss"] < 0.3 * first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_a_resumed_run_is_the_same(
    whole, tmp_path, monkeypatch, capsys, number
):
    config = write(tmp_path, train__evaluate_every=4)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_batch(patch, 9, lambda batch: os.kill(os.getpid(), number) or batch)
        assert run(config) == 0
    assert signal.getsignal(number) is before
    out = capsys.readouterr().out
    assert "stopped after step 6 of 12" in out  # the vote of step 5 was under way
    assert "--resume goes on" in out
    assert not (tmp_path / "run/evaluation.json").exists()
    assert run(config, "--resume") == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("every", [0, 5])
def test_checkpoints_come_at_their_cadence_and_at_the_end(tmp_path, monkeypatch, every):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda path, state: (saved.append(state["step"]), save(path, state))
    )
    assert run(write(tmp_path, train__checkpoint_every=every), "prepare") == 0
    assert run(tmp_path / "config.yaml", "train") == 0
    assert saved == ([5, 10, 12] if every else [12])


def test_accumulating_equals_a_larger_batch(whole, tmp_path):
    assert run(write(tmp_path, train__batch=4, train__accumulate=1, train__evaluate_every=4)) == 0
    for mine, other in zip(rows(tmp_path), rows(whole), strict=True):
        assert mine[:2] == other[:2]
        assert float(mine[2]) == pytest.approx(float(other[2]), rel=1e-4)


def test_sharded_parameters_have_the_weight_decay_of_whole_ones(whole, cpu_ranks, tmp_path):
    config = write(tmp_path, train__steps=3, train__data_parallel="fully_sharded")
    assert run(config, "prepare") == 0
    ends = cpu_ranks.run(lm_parallel_jobs.command, "train", "--config", config)
    assert ends == [(0, "")] * cpu_ranks.size
    decays = [
        {name: group["weight_decay"] for group in groups for name in group["names"]}
        for groups in (
            checkpoint.load(folder / "run")["optimizer"]["groups"] for folder in (tmp_path, whole)
        )
    ]
    assert decays[0] == decays[1]
    assert set(decays[0].values()) == {0.0, 0.1}


def test_options_of_the_model_change_no_values(whole, tmp_path):
    config = write(tmp_path, train__checkpoint_blocks=True, model__attention="reference")
    assert run(config) == 0
    for mine, other in zip(rows(tmp_path), rows(whole), strict=True):
        assert float(mine[2]) == pytest.approx(float(other[2]), rel=1e-4)


def test_weights_alone_begin_another_run(whole, tmp_path, capsys):
    data = {"source": str(whole / "text.txt"), "folder": str(whole / "data")}
    config = write(tmp_path, data={**lm_runs.SETTINGS["data"], **data}, sample__top_k=10)
    arguments = ("train", "--init-from", str(whole / "run"), "--skip-data", "48")
    assert run(config, *arguments) == 0
    mine, other = rows(tmp_path), rows(whole)
    assert mine[0][0] == "1"
    assert int(mine[0][1]) == (48 + 4) * 16
    assert float(mine[0][2]) < float(other[0][2]) - 0.5
    assert run(config, *arguments) == 1
    assert (
        "--resume goes on from it; for a new run choose another folder" in capsys.readouterr().err
    )


@pytest.fixture
def prepared(tmp_path):
    """A config whose text is prepared and whose run has a checkpoint at step 5."""
    config = write(tmp_path, train__steps=5)
    assert run(config) == 0
    return config


def refused(capsys, config, *arguments):
    """The one line of an error."""
    capsys.readouterr()
    assert run(config, *arguments) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(prepared, tmp_path, capsys):
    changes = {"train__steps": 20, "train__lr": 1e30, "train__checkpoint_every": 8}
    err = refused(capsys, write(tmp_path, log__every=10, **changes), "--resume")
    assert "step 8: loss = nan" in err
    assert "the run diverged" in err
    assert "lower train.lr" in err
    assert checkpoint.load(tmp_path / "run")["step"] == 5


def test_what_does_not_fit_is_one_line_with_its_fix(prepared, tmp_path, monkeypatch, capsys):
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    say = lambda *arguments, **changes: refused(capsys, write(tmp_path, **changes), *arguments)  # noqa: E731
    assert "--resume goes on" in say("train")
    assert "of another model: width = 16, here 32" in say("train", "--resume", model__width=32)
    assert "of another model" in say("evaluate", model__depth=2)
    assert "evaluate --init-from, --skip-data: only train" in say(
        "evaluate", "--init-from", "x", "--skip-data", "3"
    )
    assert "a run goes on, or begins" in say("train", "--resume", "--init-from", "x")
    assert "no checkpoint there" in say("train", "--resume", run=str(tmp_path / "other"))
    assert "was prepared with data.vocabulary = 280" in say("train", data__vocabulary=281)
    assert "use one of none, naive" in say(
        "train", run=str(tmp_path / "other"), train__data_parallel="quick"
    )
    assert "needs" in say("train", run=str(tmp_path / "other"), train__batch=5000)
    wide = {"train__batch": 60, "train__accumulate": 1}  # more than the validation text has
    assert "validation.bin: " in say("train", run=str(tmp_path / "other"), **wide)
    with files.alone(tmp_path / "other", pytest.fail):
        assert "another process is training there" in say("train", run=str(tmp_path / "other"))
    assert "leave no room in a context of 16" in say("sample", sample__prompt="long " * 30)
    assert "unknown key train.stepz; did you mean" in say(train__stepz=1)
    at_batch(monkeypatch, 1, lambda batch: tokens.TokenFile.take(_Wild(), [0], 4))
    assert "token 301 is beyond the vocabulary of 300" in say("train", run=str(tmp_path / "other"))
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


class _Wild:
    """A token file that was changed after it was opened."""

    path, vocabulary, tokens = "x.bin", 300, torch.full((64,), 301)


def test_another_tokenizer_is_refused(prepared, tmp_path, capsys):
    import shutil

    shutil.rmtree(tmp_path / "data")
    (tmp_path / "text.txt").write_text(
        "some other words of no use\n" * 3 + "".join(map(chr, range(300, 900))) + "\n" * 400
    )
    run(prepared, "prepare")
    assert "was trained with tokenizer" in refused(capsys, prepared, "evaluate")


def test_settings_that_changed_are_told(prepared, tmp_path, capsys):
    assert run(write(tmp_path, train__steps=7, train__clip=0.5), "--resume") == 0
    out = capsys.readouterr().out
    assert "changed since the checkpoint: train.steps = 7, was 5" in out
    assert "changed since the checkpoint: train.clip = 0.5, was 1.0" in out
    assert [row[0] for row in rows(tmp_path)] == list("1234567")


def test_a_full_disk_ends_the_run_with_one_line(prepared, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    err = refused(capsys, write(tmp_path, train__steps=7), "--resume")
    assert "cannot be written: No space left on device; the file that was there is kept" in err
    assert checkpoint.load(tmp_path / "run")["step"] == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_that_finds_no_room_is_one_line(tmp_path, monkeypatch, capsys):
    opened = Path.open
    full = lambda path, *a, **k: opened(  # noqa: E731
        Path("/dev/full") if path.name == "log.csv" else path, *a, **k
    )
    monkeypatch.setattr(Path, "open", full)
    assert "log.csv cannot be written: No space left" in refused(capsys, write(tmp_path))


def test_a_torn_row_of_the_log_is_written_again(prepared, tmp_path):
    log = tmp_path / "run/log.csv"
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(whole[:5]) + b"1")  # of step 12, say
    assert run(write(tmp_path, train__steps=7), "--resume") == 0
    assert [row[0] for row in rows(tmp_path)] == list("123467")


@pytest.mark.parametrize(
    ("module", "change"),
    [
        ("torch.utils.tensorboard", {"log__tensorboard": True}),
        ("wandb", {"log__wandb": "offline"}),
    ],
)
def test_a_logger_that_is_not_installed_says_how(tmp_path, monkeypatch, capsys, module, change):
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'blockshock[log]'" in refused(capsys, write(tmp_path, **change))


def test_a_library_that_is_missing_says_how(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("blockshock.lm.__main__.find_spec", lambda name: None)
    err = refused(capsys, write(tmp_path))
    assert "tokenizers, tqdm not installed; pip install 'blockshock[lm]'" in err
