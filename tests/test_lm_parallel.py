"""Training on tensor-parallel ranks: the dense model's run, or the plan's; resumed to the bit."""

import json
from unittest import mock

import pytest
import torch

from blockshock.lm import checkpoint
from blockshock.lm.__main__ import main
from blockshock.runs import ranks as processes
from tests import lm_parallel_jobs as jobs
from tests.lm_runs import assert_same_run, finish, rows, start, write
from tools.families.transformer import study
from tools.results import load

SIZES = {"model__depth": 2, "train__steps": 8, "train__evaluate_every": 4}
PARALLEL = {**SIZES, "model__tensor_parallel": 2}


@pytest.fixture(scope="module")
def spd(four, tmp_path_factory):
    """The folder of a run of one sync a block, two tensor-parallel by two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("spd")
    assert said(four, "--config", write(folder, **PARALLEL), "--sync", "spd") == ""
    return folder


def said(pool, *arguments, code=0):
    """What the command says on stderr, alike on all ranks but for their number."""
    answers = pool.run(jobs.command, *arguments)
    assert {each for each, _ in answers} == {code}, answers
    texts = {text.partition(f" rank {rank}:")[2] for rank, (_, text) in enumerate(answers)}
    assert len(texts) == 1, answers
    return texts.pop()


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_a_sync_after_every_sublayer_is_the_run_of_one_process(cpu_ranks, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["--config", str(write(one, **SIZES))]) == 0
    config = write(two, **PARALLEL)
    assert said(cpu_ranks, "--config", config) == ""
    assert [row[:2] for row in rows(one)] == [row[:2] for row in rows(two)]
    for mine, other in zip(rows(one), rows(two), strict=True):
        for a, b in zip(mine[2:], other[2:], strict=True):
            assert (a, b) == ("", "") or float(a) == pytest.approx(float(b), rel=2e-4)
    evaluated = [json.loads((f / "run/evaluation.json").read_text()) for f in (one, two)]
    assert evaluated[0]["loss"] == pytest.approx(evaluated[1]["loss"], rel=2e-4)
    assert evaluated[0]["tokens"] == evaluated[1]["tokens"]
    # It is the dense model's checkpoint: one process goes on from it.
    more = ["--set", "model.tensor_parallel=1", "--set", "train.steps=9"]
    assert main(["train", "--config", str(config), "--resume", *more]) == 0
    assert [row[0] for row in rows(two)] == list("123456789")


def test_a_run_with_fewer_syncs_is_resumed_to_the_bit(spd, four, tmp_path):
    losses = [float(row[2]) for row in rows(spd)]
    assert losses[-1] < losses[0]
    assert [bool(row[3]) for row in rows(spd)] == [step % 4 == 0 for step in range(1, 9)]
    steady = {**PARALLEL, "model__sync": "spd", "train__min_lr": 0.01}  # no schedule by the steps
    whole, config = write(tmp_path / "whole", **steady), write(tmp_path, **steady)
    assert said(four, "--config", whole) == ""
    assert said(four, "prepare", "--config", config) == ""
    command = "train", "--config", config
    assert said(four, *command, "--set", "train.steps=4") == ""
    assert said(four, *command, "--resume") == ""
    assert_same_run(tmp_path, tmp_path / "whole")


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_methods(four, tmp_path):
    steady = {**PARALLEL, "train__min_lr": 0.01}
    whole, config = write(tmp_path / "whole", **steady), write(tmp_path, **steady)
    for path in (whole, config):
        assert said(four, "prepare", "--config", path) == ""
    assert said(four, "train", "--config", whole) == ""
    parts = (4, "overlapped", 2, 2), (6, "fully_sharded", 1, 1), (8, "sharded_optimizer", 2, 2)
    for steps, method, tensor, accumulate in parts:
        changed = (
            f"train.steps={steps}",
            f"train.data_parallel={method}",
            f"model.tensor_parallel={tensor}",
            f"train.accumulate={accumulate}",
        )
        options = [word for each in changed for word in ("--set", each)]
        options += ["--resume"] * (steps > 4)
        assert said(four, "train", "--config", config, *options) == ""
    for mine, other in zip(rows(tmp_path), rows(tmp_path / "whole"), strict=True):
        for a, b in zip(mine[2:], other[2:], strict=True):
            assert "" in (a, b) or float(a) == pytest.approx(float(b), rel=2e-4)


@pytest.mark.parametrize("name", ["2", "spd2", "selective:[1]", "parallel", "1", None])
def test_a_checkpoint_goes_on_under_any_name_of_its_plan(spd, name):
    state = checkpoint.load(spd / "run")
    data = state["config"]["data"]["vocabulary"], state["tokenizer"]
    model = {**state["config"]["model"], "sync": name}
    if name in ("2", "spd2", "selective:[1]"):
        checkpoint.fits(state, model, *data)
    else:
        with pytest.raises(ValueError, match="was trained as plan spd on 2 tensor-parallel ranks"):
            checkpoint.fits(state, model, *data)


@pytest.mark.parametrize("method", ["flat", "sharded_optimizer"])
def test_data_parallel_methods_give_the_same_run(spd, four, tmp_path, method):
    config = write(tmp_path, **PARALLEL, model__sync="spd", train__data_parallel=method)
    assert said(four, "--config", config) == ""
    for mine, other in zip(rows(tmp_path), rows(spd), strict=True):
        assert float(mine[2]) == pytest.approx(float(other[2]), rel=2e-4)
    first, second = (checkpoint.load(f / "run")["optimizer"] for f in (tmp_path, spd))
    shapes = [{n: e["exp_avg"].shape for n, e in f["state"].items()} for f in (first, second)]
    weights = checkpoint.load(tmp_path / "run")["model"]
    assert shapes[0] == shapes[1] == {name: weights[name].shape for name in shapes[0]}


def test_what_was_trained_with_fewer_syncs_is_not_run_as_something_else(spd, tmp_path, capsys):
    config = spd / "config.yaml"
    text = refused(capsys, "evaluate", "--config", config, "--set", "model.tensor_parallel=1")
    assert "was trained as plan spd on 2 tensor-parallel ranks, here it would be the dense" in text
    again = ["--set", f"run={tmp_path / 'run'}", "--set", "model.tensor_parallel=1"]
    assert main(["train", "--config", str(config), "--init-from", str(spd / "run"), *again]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sync", "spd"], "model.sync = spd: a plan says when tensor-parallel ranks sum"),
        (["--set", "model.tensor_parallel=2"], "tensor_parallel = 2 does not divide 1 rank;"),
        (["--set", "model.tensor_parallel=2", "--sync", "7"], "does not divide 1 rank;"),
    ],
)
def test_ranks_that_are_not_there_are_refused(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, "--config", write(tmp_path), *arguments)


def test_one_process_prepares_the_tokens_for_more(tmp_path):
    assert main(["prepare", "--config", str(write(tmp_path, **PARALLEL))]) == 0


def test_what_ranks_cannot_hold_is_refused_in_one_line(cpu_ranks, tmp_path):
    config = write(tmp_path, **PARALLEL)
    pool, base = cpu_ranks, ["--config", config]
    assert "sync plan '3': 2 blocks have 1 to 2 syncs, or 4" in said(
        pool, *base, "--sync", "3", code=1
    )
    assert said(pool, "prepare", *base) == ""
    odd = ["train", *base, "--set", "model.heads=1"]
    assert "heads = 1 is not a multiple of 2 ranks" in said(pool, *odd, code=1)


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    code, out = finish(
        start("--config", write(tmp_path, **PARALLEL), "--sync", "desync:1", ranks=2)
    )
    assert code == 0, out
    assert "2 ranks, 2 hold a model: plan desync:1, 1 syncs (none)" in out
    assert (tmp_path / "run/sample.txt").read_text().startswith("def ")


def test_groups_wait_as_long_as_all_ranks_do():
    ranks = processes.Ranks(3, 4, torch.device("cpu"), None)
    with mock.patch.object(processes.dist, "new_group", return_value="group") as made:
        ranks.split(2)
    assert [call.args[0] for call in made.mock_calls] == [
        *map(range, (0, 2), (2, 4)),
        *(range(at, 4, 2) for at in range(2)),
    ]
    assert {call.kwargs["timeout"] for call in made.mock_calls} == {processes.DEADLINE}


def test_a_checkpoint_is_the_dense_models(spd):
    from blockshock.lm import config as settings
    from blockshock.lm.model import decoder_config
    from blockshock.transformer import Decoder

    found = checkpoint.load(spd / "run")
    dense = Decoder(decoder_config(settings.load(str(spd / "config.yaml"))))
    dense.load_state_dict(found["model"])
    assert all(value.device.type == "cpu" for value in found["model"].values())
    assert all(torch.isfinite(value).all() for value in found["model"].values())


def test_a_run_says_its_plan_and_where_each_start_was(spd, tmp_path):
    record = json.loads((spd / "run/run.json").read_text())
    assert record["plan"] == {"name": "spd", "kind": "group", "syncs": 2}
    (start,) = record["starts"]
    assert (start["step"], start["machine"]["ranks"]) == (0, 4)
    assert start["machine"]["device"] == "CPU (4 gloo ranks)"
    config = write(tmp_path, **SIZES, train__checkpoint_every=4)
    for steps, more in ((4, ()), (6, ("--resume",)), (8, ("--resume",))):
        assert main(["--config", str(config), "--set", f"train.steps={steps}", *more]) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["plan"] is None
    assert [start["step"] for start in record["starts"]] == [0, 4, 6]
    first, second, _ = record["starts"]
    assert (first["init_from"], first["skip_data"], first["changed"]) == (None, 0, {})
    assert second["changed"] == {"train.steps": 4}


def test_runs_become_cases_of_the_study(spd, tmp_path):
    out = tmp_path / "study.json"
    assert study.main([str(spd / "run"), "--out", str(out)]) == 0
    (result,) = load(out).results
    assert (result.case.method, result.case.batch, result.case.tensor_ranks) == ("spd", 8, 2)
    assert result.rates["val_loss"] == pytest.approx(float(rows(spd)[-1][3]), rel=1e-5)
    assert len(result.samples) == len(rows(spd)) == 8
