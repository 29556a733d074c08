"""Sync plans in the tools: what is drawn, what is judged, and runs that become results."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml

from tests import synthetic_transformer as made
from tools import compare, plot, report, summary, verdict
from tools.drawing import render
from tools.families import FAMILIES
from tools.families.transformer import study
from tools.families.transformer.hybrid import block_is_faster
from tools.families.transformer.hypotheses import decodes_faster, loses_little
from tools.families.transformer.losses import trained
from tools.families.transformer.page import full, readme, tables
from tools.families.transformer.points import (
    NAMING,
    by_place,
    communication,
    of_phase,
    place,
    seconds_a_sync,
)
from tools.family import draw_all
from tools.files import ToolError
from tools.results import load

FAMILY = FAMILIES["transformer"]
LOG = """step,tokens,loss,val_loss,lr,grad_norm,tokens_per_s,mfu,seconds,memory_mib
10,10240,5.5,,0.1,1.0,1000,0.3,60,100
20,20480,4.5,4.75,0.1,1.0,2048,0.31,120,100
30,30720,4.25,4.5,0.1,1.0,2000,0.32,180,120
"""
CONFIG = {
    "run": "runs/a",
    "device": "auto",
    "data": {"source": "python", "folder": "runs/data", "vocabulary": 512},
    "model": {
        "context": 64, "width": 32, "depth": 12, "heads": 4, "tensor_parallel": 2, "sync": "12",
    },
    "train": {
        "steps": 30, "batch": 16, "seed": 3, "autocast": "none", "compile": True, "lr": 1e-3,
        "checkpoint_blocks": False, "checkpoint_every": 0,
    },
    "log": {"every": 10},
    "sample": {},
}  # fmt: skip
CPU, OTHER = "CPU (2 gloo ranks)", "CPU of another kind"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return made.write(tmp_path_factory.mktemp("made") / "tp.json", made.everything())


@pytest.fixture(scope="module")
def results(file):
    return load(file)


@pytest.fixture
def run(tmp_path):
    """Makes the folder of a run; `changes` replace fields of its record or settings of `train`."""

    def make(name, log=LOG, sync="12", kind="group", syncs=12, devices=(CPU,), **train):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "log.csv").write_text(log)
        config = {**CONFIG, "run": name, "model": {**CONFIG["model"], "sync": sync}}
        config["train"] = {**CONFIG["train"], **train}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        starts = [
            {
                "step": step,
                "machine": {"device": device, "kind": "cpu", "ranks": 2, "torch": "2.11.0"},
                "commit_info": {"id": "0123456789", "dirty": False},
            }
            for step, device in enumerate(devices)
        ]
        plan = {"name": sync, "kind": kind, "syncs": syncs}
        record = {"plan": plan, "tokenizer": "abc", "starts": starts}
        (folder / "run.json").write_text(json.dumps(record))
        return folder

    return make


def read(tmp_path, entries):
    return load(made.write(tmp_path / "a.json", entries))


@pytest.mark.slow
def test_every_figure_is_drawn(results):
    drawings, absent = draw_all(results, FAMILY)
    assert not absent
    main = [drawing.name for drawing in drawings if not drawing.setting]
    assert main == list(FAMILY.figures)
    for drawing in drawings:
        assert drawing.subtitle.startswith("2x NVIDIA H200 · ")
        assert len(render.png(drawing)) > 5_000


def test_times_stand_over_the_syncs_of_their_plan(results):
    drawings = {d.name: d for d in draw_all(results, FAMILY)[0]}
    panels = drawings["transformer_decode_time"].panels
    assert [panel.title for panel in panels] == [
        f"{model}, batch {batch}, 1024 in the cache"
        for model in ("124M", "1.3B")
        for batch in (1, 16)
    ]
    (line,) = (line for line in panels[0].lines if line.label == "exchange")
    assert [point.x for point in line.points] == [2, 3, 4, 6, 9, 12, 24]
    (result,) = (r for r in of_phase(results, "decode") if r.id.endswith(
        "spd_2-exchange-768x12-B1-T1024-bf16"))  # fmt: skip
    assert line.points[3].y == 1e3 * result.median
    (desync,) = (line for line in panels[2].lines if line.label == "desync · collective")
    assert [point.x for point in desync.points] == [24]
    ratios = drawings["transformer_decode_ratio"].panels[0]
    (standard,) = (line.points[-1].y for line in ratios.lines if line.label == "collective")
    assert standard == 1.0
    shares = drawings["transformer_decode_communication"].panels[0].lines[0]
    assert 0 < shares.points[0].y < shares.points[-1].y < 100
    here = by_place(of_phase(results, "decode"))[place(result.case)]
    cost = seconds_a_sync([r for r in here if r.case.reduce == "exchange"])
    assert communication(result, here) == pytest.approx(6 * cost / result.median)


def test_what_a_sync_costs_is_the_slope_of_the_row_of_plans():
    def plan(method, syncs, seconds):
        return SimpleNamespace(
            case=SimpleNamespace(method=method), rates={"syncs": syncs}, median=seconds
        )

    row = [plan("tp", 24, 52e-6), plan("spd", 12, 28e-6), plan("spd_2", 6, 16e-6)]
    assert seconds_a_sync(row) == pytest.approx(2e-6)
    assert seconds_a_sync([*row, plan("desync", 24, 1.0)]) == pytest.approx(2e-6)
    assert seconds_a_sync(row[:2]) is None


def test_losses_are_compared_at_the_same_step_and_recipe(results):
    drawings = {d.name: d for d in draw_all(results, FAMILY)[0]}
    loss, above = drawings["transformer_study_losses"].panels
    assert [line.label for line in loss.lines][:2] == ["24 syncs", "12 syncs"]
    (two,) = (line for line in above.lines if line.label == "2 syncs")
    assert [point.y for point in two.points] == pytest.approx([1.06] * 20)
    assert above.y.rule == 1.02
    (short,) = (d for name, d in drawings.items() if "losses_" in name)
    assert "300 steps of 131 k tokens" in short.subtitle
    assert "seeds 0, 1, 2" in short.subtitle
    point = short.panels[0].lines[0].points[-1]
    assert point.low < point.y < point.high


def test_the_trade_has_a_panel_for_each_speed_that_was_measured(results):
    drawings = {d.name: d for d in draw_all(results, FAMILY)[0]}
    training, step, *decoding = drawings["transformer_study_trade"].panels
    assert step.title == "a training step, batch 16, 1024 tokens"
    assert [panel.title for panel in decoding] == [
        "decoding, batch 1, 1024 in the cache",
        "decoding, batch 16, 1024 in the cache",
    ]
    spots = {line.label: line.points[0] for line in training.lines}
    assert (spots["24 syncs"].x, spots["12 syncs"].x) == pytest.approx((1.0, 0.64 / 0.52))
    assert spots["12 syncs"].y == pytest.approx(1.004 * spots["24 syncs"].y)
    assert training.y.rule == pytest.approx(1.02 * spots["24 syncs"].y)
    (standard,) = (line.points[0].x for line in step.lines if line.label == "24 syncs")
    assert standard == 1.0


def test_the_verdict_names_the_fewest_syncs_with_seeds_and_noise(results):
    found = loses_little(results)
    long, short = found.sentence.split("from a difference. ")
    assert long.startswith("6 syncs are the fewest within 2% of 24 syncs: +1.30% (768×12, 1000")
    assert "One seed cannot tell noise" in long
    assert "the worst of 3 seeds" in short
    assert "scatter by 0.1" in short
    statuses = {one.line.partition(" (")[0]: one.status for one in found.deciding[:6]}
    assert list(statuses.items()) == [
        ("12 syncs", "holds"), ("9 syncs", "holds"), ("6 syncs", "holds"),
        ("4 syncs", "fails"), ("3 syncs", "fails"), ("2 syncs", "fails"),
    ]  # fmt: skip
    assert {one.line.partition(",")[0] for one in found.beside} == {"desync", "parallel"}


def test_a_plan_whose_seeds_disagree_is_neither(tmp_path):
    entries = [made.study("tp", seed=seed) for seed in (0, 1)]
    entries += [made.study("spd", seed=0), made.study("spd", seed=1, last=3.1)]
    (one,) = loses_little(read(tmp_path, entries)).judgements
    assert one.status == "mixed"
    assert "+0.40% to +3.75% over 2 seeds" in one.words


def test_seeds_and_recipes_that_the_baseline_lacks_are_not_compared(tmp_path):
    entries = [made.study("tp"), made.study("spd", seed=1), made.study("spd_2", recipe="ffffffff")]
    results = read(tmp_path, entries)
    (one,) = loses_little(results).judgements
    assert (one.status, one.points) == ("undecided", ())
    assert [len(plans) for plans in trained(results)] == [2, 1]
    assert "Not measured: it needs runs" in loses_little(read(tmp_path, entries[1:])).sentence


def test_decoding_is_judged_by_its_whole_interval(tmp_path):
    at = {"tp": 1.0, "spd": 0.89, "spd_2": 0.80, "spd_4": 0.7}
    entries = []
    for method, ratio in at.items():
        one = made.timed("decode", method)
        one["stats"]["data"] = [1e-3 * ratio * (1 + 0.01 * (i % 5 - 2)) for i in range(30)]
        entries.append(one)
    entries.append(made.timed("decode", "tp", reduce="exchange"))
    found = {one.line.partition(" (")[0]: one for one in decodes_faster(read(tmp_path, entries))
             .judgements}  # fmt: skip
    assert found["12 syncs"].status == "holds"  # the same rounds: the interval has no width
    assert found["6 syncs"].status == "holds"
    entries[1]["stats"]["data"] = [1e-3 * 0.91 * (1 + 0.02 * (i % 7 - 3)) for i in range(30)]
    found = decodes_faster(read(tmp_path, entries))
    assert found.judgements[0].status == "undecided"
    assert {one.line.partition(" (")[0] for one in found.beside} == {
        "3 syncs",
        "24 syncs · exchange",
    }


def test_the_hybrid_block_is_compared_with_itself_with_dense_attention(results):
    drawings = {d.name: d for d in draw_all(results, FAMILY)[0]}
    (panel,) = drawings["transformer_hybrid_backward_speedup"].panels
    lines = {line.label: line for line in panel.lines}
    line = lines["sparse_attention · band(1024)"]
    assert [point.x for point in line.points] == [4096, 8192, 16384, 32768]
    assert line.points[0].y < line.points[-1].y
    found = block_is_faster(results)
    assert len(found.deciding) == 2
    assert len(found.beside) == 8
    assert all("T = 32768" in one.line for one in found.deciding)
    assert {one.status for one in found.deciding} == {"fails"}  # 2.4 times: the model's own


def test_what_is_missing_is_said(tmp_path):
    results = read(tmp_path, [made.timed("decode", "spd")])
    drawings, absent = draw_all(results, FAMILY)
    assert not drawings
    assert "no point has two plans" in absent["transformer_decode_time"]
    assert "no results of the training study" in absent["transformer_study_losses"]
    assert readme(results) is None
    assert "Not measured" in decodes_faster(results).sentence


def test_a_run_s_neighbours_are_known_by_their_labels(results):
    labels = {r.run_label for r in results.results}
    assert {"tp", "spd_2-exchange", "desync-two_shot"} <= labels
    assert {r.case.method for r in results.results} == set(NAMING.methods)
    for here in by_place(of_phase(results, "decode")).values():
        assert len(here) == 27


def test_tables_have_every_case_and_the_readme_the_trade(results):
    rows = [row for table in tables(results) for row in table.rows]
    assert len(rows) == len(results.results)
    written = readme(results)
    assert "1000 steps of 131 k tokens" in written.words
    assert written.table.count("\n") == 8  # seven plans
    assert "| 6 syncs | 3.0" in written.table
    assert len(full(results)) == 2 + 4 + 2 + 8


def test_the_readme_s_table_needs_no_study(tmp_path):
    entries = [made.timed("decode", m, reduce=s) for m in ("tp", "spd") for s in made.SUM_SECONDS]
    written = readme(read(tmp_path, entries))
    assert written.table.splitlines()[0] == (
        "| plan | decoding, batch 1, collective | decoding, batch 1, exchange |"
    )
    assert written.table.splitlines()[2].startswith("| 24 syncs | 1.000 | 0.5")
    assert "summed by the backend (collective): 0.402 ms." in written.words
    assert readme(read(tmp_path, entries[:1])) is None


@pytest.mark.slow
def test_a_file_goes_through_every_tool(file, tmp_path, capsys):
    assert plot.main([str(file), "-o", str(tmp_path), "--only", "transformer_study_trade"]) == 0
    assert verdict.main([str(file), "--out", str(tmp_path)]) == 0
    assert "T1" in (tmp_path / "verdict.md").read_text()
    assert report.main([str(file), "-o", str(tmp_path)]) == 0
    assert "Tensor parallelism with fewer syncs" in (tmp_path / "report.html").read_text()
    (tmp_path / "R.md").write_text("<!-- transformer:begin -->\n<!-- transformer:end -->\n")
    assert summary.main([str(file), "--readme", str(tmp_path / "R.md")]) == 0
    assert compare.main([str(file), str(file)]) == 0


def test_runs_become_a_file_that_the_tools_read(run, tmp_path, capsys):
    folders = [
        run("a", sync="24", syncs=24),
        run("b"),
        run("c", seed=4),
        run("d", sync="selective:[3, 9, 23]", syncs=3),
        run("e", sync="desync:12", kind="desync"),
        run("f", sync="5", syncs=5),
    ]
    out = tmp_path / "study.json"
    assert study.main([*map(str, folders), "--out", str(out)]) == 0
    assert "has 6 runs" in capsys.readouterr().out
    results = load(out)
    assert results.commits == ("0123456",)
    assert results.device == CPU
    found = {(r.case.method, r.case.seed): r for r in results.results}
    assert len({r.case.recipe for r in results.results}) == 1
    one = found["spd", 3]
    assert one.samples == pytest.approx((1.024, 0.5, 0.512))
    assert one.curves["val_step"] == (20, 30)
    assert one.curves["val_loss"] == (4.75, 4.5)
    assert one.rates["tokens_per_s"] == 2000
    assert (one.rates["syncs"], one.rates["val_loss"]) == (12, 4.5)
    assert (one.case.batch, one.case.T, one.case.steps, one.case.dtype) == (16, 64, 30, "fp32")
    assert one.memory["peak_bytes"] == pytest.approx(120 * 2**20, rel=1e-5)
    (plans,) = trained(results)
    words = [(plan.words, plan.evenly, len(plan.runs)) for plan in plans]
    assert words == [
        ("24 syncs", True, 1),
        ("12 syncs", True, 2),
        ("desync, 12 syncs", False, 1),
        ("5 syncs", True, 1),
        ("selective:[3, 9, 23], 3 syncs", False, 1),
    ]


def test_other_settings_make_another_recipe(run):
    found = (
        study.entry(run(name, **train))
        for name, train in (("a", {}), ("b", {"lr": 2e-3}), ("c", {"checkpoint_every": 5}))
    )
    recipes = [made["extra_info"]["case"]["recipe"] for made in found]
    assert recipes[0] == recipes[2] != recipes[1]


def test_losses_of_several_machines_stand_together_and_speeds_do_not(run, tmp_path, capsys):
    folders = run("a", sync="24", syncs=24), run("b", devices=(CPU, OTHER)), run("c", seed=4)
    out = tmp_path / "study.json"
    assert study.main([*map(str, folders), "--out", str(out)]) == 0
    assert f"3 runs, 1 of them without a speed: not on {CPU} alone" in capsys.readouterr().out
    results = load(out)
    (plans,) = trained(results)
    assert [(plan.words, plan.speed) for plan in plans] == [("24 syncs", 1.0), ("12 syncs", None)]
    modes = {r.case.method + str(r.case.seed): r.timing["mode"] for r in results.results}
    assert modes["spd3"] == f"log of {CPU}, {OTHER}"
    assert plans[1].above == [0.0]


def test_runs_that_shared_a_machine_have_losses_and_no_speed(run, tmp_path, capsys):
    folders = run("a", sync="24", syncs=24), run("b")
    out = tmp_path / "study.json"
    assert study.main([*map(str, folders), "--shared", "--out", str(out)]) == 0
    assert "2 runs, 2 of them without a speed: beside other runs" in capsys.readouterr().out
    results = load(out)
    (plans,) = trained(results)
    assert [(plan.loss, plan.speed) for plan in plans] == [(4.5, None), (4.5, None)]
    assert {r.timing["mode"] for r in results.results} == {f"log of {CPU}, beside other runs"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 40}, r"ended at step 30 of 40: train it to its end \(--resume\)"),
        ({"log": LOG + "40,40960,4.2,,0.1,1,2000,0.3,240,120\n"}, "no val_loss at the last step"),
        ({"seed": 3}, "are of one plan, recipe and seed: leave one out"),
    ],
)
def test_runs_that_cannot_be_compared_are_one_line(run, changes, message):
    with pytest.raises(ToolError, match=message):
        study.gathered([run("first"), run("second", **{"seed": 4, **changes})])


@pytest.mark.parametrize(
    ("started", "message"),
    [
        ([{"init_from": "runs/a"}], "trained with --init-from"),
        ([{"skip_data": 5}], "trained with --skip-data"),
        ([{}, {"changed": {"train.lr": 0.1}}], "train.lr = 0.1 before it was resumed"),
        ([{}, {"changed": {"train.seed": 1}}], "train.seed = 1 before it was resumed"),
        ([{}, {"ranks": 4}], "2 and then 4 ranks"),
        ([{}, {"changed": {"run": "x", "log.every": 1, "train.checkpoint_every": 5}}], None),
    ],
)
def test_a_run_whose_settings_do_not_say_its_course_is_refused(run, started, message):
    folder = run("a", devices=(CPU,) * len(started))
    record = json.loads((folder / "run.json").read_text())
    for start, more in zip(record["starts"], started, strict=True):
        start["machine"]["ranks"] = more.pop("ranks", 2)
        start.update(more)
    (folder / "run.json").write_text(json.dumps(record))
    if message is None:
        study.entry(folder)
        return
    with pytest.raises(ToolError, match=message):
        study.entry(folder)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.json", "[]"),
        ("run.json", '{"plan": {"name": "tp", "kind": "group", "syncs": 24}}'),
        ("run.json", '{"plan": "tp", "tokenizer": "", "starts": []}'),
        ("config.yaml", "[1]"),
        ("config.yaml", "train: {steps: 20}"),
    ],
)
def test_files_that_no_run_wrote_are_one_line(run, file, text):
    folder = run("a")
    (folder / file).write_text(text)
    with pytest.raises(ToolError, match=f"{file} has no .* where a run writes it"):
        study.gathered([folder])


def test_any_number_of_syncs_is_judged_like_those_with_a_rule(run, tmp_path):
    folders = [run(str(syncs), sync=str(syncs), syncs=syncs) for syncs in (24, 5, 1)]
    out = tmp_path / "study.json"
    study.main([*map(str, folders), "--out", str(out)])
    results = load(out)
    assert {r.case.method for r in results.results} == {"tp", "syncs_5", "syncs_1"}
    told = loses_little(results).sentence
    assert told.startswith("1 sync is the fewest within 2% of 24 syncs")
    draw_all(results, FAMILY)


def test_the_baseline_alone_is_no_verdict(tmp_path):
    told = loses_little(read(tmp_path, [made.study("tp")])).sentence
    assert told.startswith("Not measured")


def test_a_folder_that_is_no_run_under_a_plan_is_one_line(run, tmp_path):
    folder = run("a")
    record = json.loads((folder / "run.json").read_text()) | {"plan": None}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ToolError, match=r"names no plan: .* was not trained with --sync"):
        study.entry(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(ToolError, match="is not JSON: copy the run again"):
        study.entry(folder)
    shutil.rmtree(folder)
    with pytest.raises(ToolError, match="cannot be read"):
        study.entry(folder)
