"""Vision runs in one process and on two ranks: they learn tiles, resume to the bit, and refuse."""

import json
import os
import shutil
import signal

import pytest
import torch

from blockshock.block_sparse.__main__ import main
from blockshock.runs import files
from blockshock.vision import checkpoint
from tests import vision_jobs, vision_runs
from tests.vision_runs import Made, assert_same_run, rows, state, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def made_up_images(monkeypatch):
    vision_runs.use_made(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        vision_runs.use_made(patch)
        assert run(write(folder)) == 0
    return folder


def run(config, *more):
    return main([*more, "--config", str(config)])


def at_batch(monkeypatch, number, act):
    """Calls `act()` as training reads the batch of this number, from 1."""
    original = Made.training

    def training(self, sequences):
        for count, batch in enumerate(original(self, sequences), 1):
            if count == number:
                act()
            yield batch

    monkeypatch.setattr(Made, "training", training)


def test_without_a_command_all_is_done_once(whole, capsys):
    assert [int(row["step"]) for row in rows(whole)] == list(range(1, 9))
    assert [bool(row["top1"]) for row in rows(whole)] == [False] * 7 + [True]
    found = json.loads((whole / "run/evaluation.json").read_text())
    assert (found["step"], found["storage"]) == (8, "bsr")
    assert found["folded"]["images"] == found["converted"]["images"] == 19
    assert found["folded"]["top1"] == pytest.approx(float(rows(whole)[-1]["top1"]))
    assert found["sizes"]["hidden"] == 64
    assert found["apart"] < 1e-5
    assert (found["machine"]["kind"], found["machine"]["ranks"]) == ("cpu", 1)
    assert {"id", "dirty"} == (found["commit_info"] or {"id": 0, "dirty": 0}).keys()
    times = json.loads((whole / "run/benchmark.json").read_text())
    assert times["dense"]["speedup"] == 1
    assert times["bsr"]["ms"] > 0
    assert "multiple" in times["semi_structured"]["left"]
    before = (whole / "run/checkpoint.pt").read_bytes()
    assert run(whole / "config.yaml") == 0
    out = capsys.readouterr().out
    assert "trained already: 8 steps" in out
    assert "4 of 4 pruned layers are now bsr" in out
    assert "weights of step 8" in out
    assert (whole / "run/checkpoint.pt").read_bytes() == before


def test_sparsity_follows_the_schedule_and_the_tiles_are_as_many_as_it_says(whole):
    shown = [float(row["sparsity"]) for row in rows(whole)]
    # Over 4 steps, of 8 tiles a layer: ⌊8 · 0.5 (1 − (1 − t/4)³)⌋ are dropped.
    assert shown == [2 / 8, 3 / 8, 3 / 8, 4 / 8] + [4 / 8] * 4
    found = checkpoint.load(whole / "run")
    for weights in (found["model"], found["average"]):
        counts = [value for name, value in weights.items() if name.endswith(".kept")]
        assert [int(count) // 2 for count in counts] == [4] * 4


@pytest.mark.slow
def test_a_tiny_model_learns_made_up_images(tmp_path):
    changes = {"train__steps": 60, "train__accumulate": 1, "train__batch": 16, "log__every": 10}
    assert run(write(tmp_path, **changes, train__mixup=0.0, train__cutmix=0.0)) == 0
    assert float(rows(tmp_path)[-1]["top1"]) > 90
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert found["converted"] == pytest.approx(found["folded"])
    assert found["converted"]["top1"] > 90


NO_AVERAGE = {"train__average": 0.0, "train__autocast": "bf16"}


@pytest.mark.parametrize("changed", [{}, pytest.param(NO_AVERAGE, marks=pytest.mark.slow)])
def test_a_signal_ends_the_step_and_a_resumed_run_is_the_same(
    whole, tmp_path, monkeypatch, capsys, changed
):
    other = whole
    if changed:
        other = tmp_path / "other"
        assert run(write(other, **changed), "train") == 0
    config = write(tmp_path / "cut", **changed)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_batch(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(config) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    out = capsys.readouterr().out
    assert "stopped after step 5 of 8" in out  # the vote of step 4 was under way
    assert "--resume goes on" in out
    assert not (tmp_path / "cut/run/evaluation.json").exists()
    assert run(config, "--resume") == 0
    if changed:
        assert rows(tmp_path / "cut") == rows(other)
    else:
        assert_same_run(tmp_path / "cut", other)


def test_weights_alone_begin_another_run_whose_tiles_are_scored_by_them(tmp_path):
    dense = write(tmp_path / "dense", sparse={"linear": 0.0})
    assert run(dense, "train") == 0
    config = write(tmp_path / "sparse", train__steps=1, train__warmup=0, train__lr=0.0)
    arguments = ("train", "--init-from", str(tmp_path / "dense/run"))
    assert run(config, *arguments) == 0
    begun, ended = state(tmp_path / "sparse"), checkpoint.load(tmp_path / "dense/run")["average"]
    weight = ended["blocks.0.mlp.up.weight"]
    assert torch.equal(begun["model.blocks.0.mlp.up.weight"], weight)
    means = weight.view(4, 16, 2, 16).abs().mean((1, 3))
    torch.testing.assert_close(begun["model.blocks.0.mlp.up.scores"], means / means.mean())


def test_a_dense_run_is_evaluated_and_timed_dense(tmp_path, capsys):
    config = write(tmp_path, sparse={"linear": 0.0}, use__storage="dense")
    assert run(config) == 0
    assert "no layer has a mask" in capsys.readouterr().out
    times = json.loads((tmp_path / "run/benchmark.json").read_text())
    assert "none had a mask" in times["bsr"]["left"]


def test_a_model_is_timed_before_it_is_trained(tmp_path, capsys):
    config = write(tmp_path, use__dtype="bf16")
    assert run(config, "benchmark") == 0
    assert "16 images of 8 pixels, bf16, cpu, initial weights" in capsys.readouterr().out


def refused(capsys, config, *arguments):
    """The one line of an error."""
    capsys.readouterr()
    assert run(config, *arguments) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_what_does_not_fit_is_one_line_with_its_fix(whole, tmp_path, monkeypatch, capsys):
    before = (whole / "run/checkpoint.pt").read_bytes()
    there = {"run": str(whole / "run")}
    say = lambda *arguments, **changes: refused(capsys, write(tmp_path, **changes), *arguments)  # noqa: E731
    assert "--resume goes on" in say("train", **there)
    assert "of another model: model.width = 32, here 64" in say(
        "train", "--resume", **there, model__width=64
    )
    assert "sparse.block = 16, here 32" in say("evaluate", **there, sparse__block=32)
    assert "evaluate --resume: only train reads it" in say("evaluate", "--resume", **there)
    assert "a run goes on, or begins" in say("train", "--resume", "--init-from", "x")
    assert "no checkpoint there; train first" in say("evaluate")
    assert "use one of none, naive" in say("train", train__data_parallel="quick")
    assert "cannot be held so: " in say("evaluate", **there, use__storage="semi_structured")
    assert "sparse: skip = 'heads' fits no linear layer" in say("train", sparse__skip=["heads"])
    assert "(64, 64) in a weight [64, 32]: sparsity = 0.5 of 1" in say("train", sparse__block=64)
    for changes in {"sparse__block": 8}, {"sparse": {"linear": 0.0}}:
        assert "use.storage = bsr: " in say(**changes)  # before anything is trained
        assert not (tmp_path / "run/checkpoint.pt").exists()
    assert "model: width = 33 is no multiple" in say("train", model__width=33)
    with files.alone(tmp_path / "run", pytest.fail):
        assert "another process is training there" in say("train")
    diverging = {"train__lr": 1e30, "train__warmup": 0, "train__clip": 0.0}
    assert "the run diverged" in say("train", **diverging)
    assert (whole / "run/checkpoint.pt").read_bytes() == before
    shutil.copytree(whole / "run", tmp_path / "run", dirs_exist_ok=True)
    for text in "step,other\n1,2\n", "step,memory_mib\none,2\n":
        (tmp_path / "run/log.csv").write_text(text)
        assert "no log with the columns of this version" in say("train", "--resume", train__steps=9)
        assert (tmp_path / "run/log.csv").read_text() == text


def test_a_checkpoint_of_a_language_model_is_refused(tmp_path, capsys):
    from blockshock.lm import checkpoint as of_lm

    of_lm.save(tmp_path / "run/checkpoint.pt", {"step": 1})
    assert "format 1, and this version reads vision 1" in refused(
        capsys, write(tmp_path), "evaluate"
    )


def test_ranks_train_what_one_process_trains_whole_or_sharded(cpu_ranks, tmp_path):
    plain = {"train__mixup": 0.0, "train__cutmix": 0.0, "train__accumulate": 1, "train__steps": 4}
    alone = tmp_path / "alone"
    assert run(write(alone, **plain, train__batch=2 * cpu_ranks.size), "train") == 0
    for method in ("overlapped", "fully_sharded"):
        folder = tmp_path / method
        config = write(folder, **plain, train__batch=2, train__data_parallel=method)
        for command in ("train", "evaluate"):
            ends = cpu_ranks.run(vision_jobs.command, command, "--config", config)
            assert ends == [(0, "")] * cpu_ranks.size
        for one, other in zip(rows(folder), rows(alone), strict=True):
            assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-3), method
            assert one["sparsity"] == other["sparsity"]
        saved, expected = (checkpoint.load(place / "run") for place in (folder, alone))
        decays = [
            {
                name: group["weight_decay"]
                for group in each["optimizer"]["groups"]
                for name in group["names"]
            }
            for each in (saved, expected)
        ]
        assert decays[0] == decays[1]
        assert set(decays[0].values()) == {0.0, 0.05}
        for part in ("model", "average"):
            assert saved[part].keys() == expected[part].keys()
            for name, value in expected[part].items():
                torch.testing.assert_close(saved[part][name], value, rtol=0, atol=2e-3)
        found = json.loads((folder / "run/evaluation.json").read_text())
        assert found["folded"]["images"] == 19
        assert found["apart"] < 1e-5
