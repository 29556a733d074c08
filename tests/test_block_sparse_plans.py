"""A plan is the fastest that was measured, from the disk or the shipped table, or else the rule."""

import json

import pytest
import torch

from blockshock import tune, tuning
from blockshock.block_sparse import plans
from blockshock.kernels import block_lists, block_plans

LISTS = block_lists.lists_reference(torch.eye(10, dtype=torch.bool), 10)
HOPPER = "NVIDIA H100 80GB HBM3"


class Rows:
    """Rows of x on a GPU, as far as a plan asks."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """disk({question: way}) -> what was measured; shipped likewise."""
    monkeypatch.setattr(tuning, "cache_file", lambda: tmp_path / "ways.json")
    monkeypatch.setattr(tuning, "_alone", tuning.Memory())
    monkeypatch.setattr(plans, "_chosen", {})
    monkeypatch.setattr(plans, "SHIPPED", tmp_path / "plans.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: HOPPER)
    plans.shipped.cache_clear()

    def write(found, shipped=None):
        entries = {asked: {"way": way, "seconds": {way: 1.0}} for asked, way in found.items()}
        (tmp_path / "ways.json").write_text(json.dumps(entries))
        entries = {q: {"way": way, "seconds": {way: 1.0}} for q, way in (shipped or {}).items()}
        (tmp_path / "plans.json").write_text(json.dumps({HOPPER: entries}))

    yield write
    plans.shipped.cache_clear()


def chosen(rows=4096, side="Y", block=64):
    return plans.chosen(side, (640, 640), LISTS, block, Rows(rows))


def asked(rows=4096, side="Y", block=64):
    return plans.question(side, (640, 640), LISTS, block, Rows(rows))


def test_a_question_names_what_the_time_depends_on():
    assert asked() == "block_sparse Y: N=640 K=640 block=64 kept=0.10 B=4096 bfloat16"


def test_without_a_measurement_the_rule_decides(disk):
    disk({})
    assert chosen() == block_plans.PRODUCTS[64][0]
    assert chosen(side="dW") == block_plans.GRADIENTS[64][0]


def test_what_was_measured_comes_before_what_is_shipped(disk):
    first, second = list(plans.candidates("Y", 64, 4096))[2:4]
    disk({}, shipped={asked(): first})
    assert str(chosen()) == first
    disk({asked(2100): second}, shipped={asked(2100): first})
    assert str(chosen(2100)) == second
    assert str(chosen(2200)) == second  # of the same class of rows
    assert chosen(2400) == block_plans.PRODUCTS[64][0]


def test_a_way_that_is_no_candidate_is_not_taken(disk):
    disk({asked(): "1x1, 1 warps, 1 stages"})
    assert chosen() == block_plans.PRODUCTS[64][0]


def test_answers_are_shipped_by_gpu(disk, tmp_path):
    disk({})
    name = list(plans.candidates("Y", 64, 4096))[3]
    answer = tuning.Answer(name, "measured", {name: 1.23456e-3, "other": 2e-3})
    plans.ship({asked(): answer}, Rows.device, plans.SHIPPED)
    assert str(chosen()) == name
    table = json.loads(plans.SHIPPED.read_text())
    assert table == {HOPPER: {asked(): {"way": name, "seconds": {name: 1.235e-3, "other": 2e-3}}}}


def test_the_shipped_table_names_plans_that_there_are():
    for entries in json.loads(plans.SHIPPED.read_text()).values():
        for question, entry in entries.items():
            side = question.split()[1].rstrip(":")
            sizes = dict(word.split("=") for word in question.split() if "=" in word)
            known = plans.candidates(side, int(sizes["block"]), int(sizes["B"]))
            assert entry["way"] in known


@pytest.mark.parametrize("block", block_plans.BLOCKS)
def test_every_plan_fits_and_is_named_once(block):
    for B in (1, 64, 100, 1000, 65536):
        for side in plans.SIDES:
            known = plans.candidates(side, block, B)
            assert next(iter(known.values())) in known.values()
            for plan in known.values():
                assert plan.rows * block <= 32 * plan.warps * block_plans.SUMS
                held = (plan.rows + block) * plan.step * 2 * plan.stages + block_plans.RESERVED
                if plan.each:  # a tile of Y is written while loads are on their way
                    held += plan.rows * block * 2 // block_plans.halves(plan, block)
                assert max(plan.each, 1) * held <= block_plans.SHARED


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--block", "48"], "--block 48: use 16, 32"),
        (["--shape", "64"], "shapes are NxK"),
        (["--sparsity", "1.5"], "sparsity = 1.5"),
        (["--sparsity", "much"], "numbers below 1"),
    ],
)
def test_the_command_refuses_what_cannot_be(words, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(["block_sparse", *words])
    assert message in capsys.readouterr().err


def test_all_sides_are_measured_by_all_their_plans(disk, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton; it is in the extra `dev`")
    disk({})
    ran = {}

    def pick(question, kinds, device):
        (steps,) = kinds.values()
        ran[question] = list(steps)
        next(iter(steps.values()))()
        return tuning.Answer(next(iter(steps)), "measured", dict.fromkeys(steps, 1.0))

    monkeypatch.setattr(tuning, "pick", pick)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones(40, 160, dtype=torch.float16, device=where)
    found = plans.measure((160, 160), LISTS.to(where), 16, x)
    assert list(found) == list(ran)
    for (question, names), side in zip(ran.items(), plans.SIDES, strict=True):
        assert question.startswith(f"block_sparse {side}: N=160 K=160 block=16 kept=0.10 B=40")
        assert names == list(plans.candidates(side, 16, 40))


@pytest.mark.gpus(1)
def test_the_command_measures_on_a_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSHOCK_CACHE", str(tmp_path))
    tuning.forget()
    words = ["--shape", "512x512", "--block", "32", "--sparsity", "0.8", "--B", "256"]
    assert tune.main(["block_sparse", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [f"block_sparse {s}" for s in plans.SIDES]
    tuning.forget()
    tuning.exact_sizes(False)
