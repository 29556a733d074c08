"""Block-sparse layers in the tools: what is drawn, compared and judged, and the study's file."""

import json
from dataclasses import replace

import pytest
import yaml

from tests import synthetic_block_sparse as made
from tools import plot, report, summary, verdict
from tools.drawing import render
from tools.families import FAMILIES
from tools.families.block_sparse import study
from tools.families.block_sparse.accuracy import trained
from tools.families.block_sparse.hypotheses import judge_all
from tools.families.block_sparse.page import full, readme, tables
from tools.families.block_sparse.points import by_place, of_method, of_phase, speed, where
from tools.family import draw_all
from tools.files import ToolError
from tools.judged import FAILS, HOLDS, MIXED, UNDECIDED
from tools.results import load

FAMILY = FAMILIES["block_sparse"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    entries = made.everything() + made.trained()
    options = {"device": "1x NVIDIA H100", "ranks": 1}
    return made.write(tmp_path_factory.mktemp("made") / "bsr.json", entries, **options)


@pytest.fixture(scope="module")
def results(file):
    return load(file)


def read(tmp_path, entries):
    return load(made.write(tmp_path / "a.json", entries))


def judged(results):
    return {one.name: one for one in judge_all(results, 0.02)}


def test_every_figure_is_drawn(results):
    drawings, absent = draw_all(results, FAMILY)
    assert not absent
    assert [drawing.name for drawing in drawings] == list(FAMILY.figures)
    for drawing in drawings:
        assert drawing.subtitle.startswith("1x NVIDIA H100 · ")
        assert len(render.png(drawing)) > 5_000


def test_a_long_subtitle_goes_on_below_and_covers_nothing(results):
    drawing = draw_all(results, FAMILY)[0][0]
    figure = render.figure(replace(drawing, subtitle=drawing.subtitle + " and more" * 30))
    title, box = (text.get_window_extent() for text in figure.texts)
    assert max(title.x1, box.x1) <= figure.bbox.width
    assert box.y0 >= max(axes.get_tightbbox().y1 for axes in figure.axes)


def test_speed_over_sparsity_stands_beside_the_ideal(results):
    drawings = {d.name: d for d in draw_all(results, FAMILY)[0]}
    first, *_ = drawings["block_sparse_forward_vs_sparsity"].panels
    assert first.title == "8192 square, 4096 rows"
    lines = {line.label: line for line in first.lines}
    found = {round(1 - 1 / p.x, 2): p.y for p in lines["bsr, block 64"].points}
    assert list(found) == [0.6, 0.8, 0.9, 0.95]
    assert found[0.9] == pytest.approx(1 + 1.2 * 4, rel=0.01)
    assert [p.x for p in lines["torch_bsr, block 32"].points] == pytest.approx([5, 10])
    ideal = lines["ideal: 1 / (1 − s)"]
    assert ideal.bound
    assert all(p.x == p.y for p in ideal.points)


def test_latency_has_a_group_for_each_model(results):
    (panel,) = {d.name: d for d in draw_all(results, FAMILY)[0]}[
        "block_sparse_model_latency"
    ].panels
    assert [name.split("\n")[0] for name in panel.names] == [
        "ViT-B/16",
        "ViT-B/16",
        "ViT-L/16",
        "ViT-H/14",
    ]
    assert [line.label for line in panel.lines] == ["dense", "bsr", "semi_structured"]


def test_accuracy_has_a_line_for_each_form_with_all_seeds(results):
    (panel,) = {d.name: d for d in draw_all(results, FAMILY)[0]}[
        "block_sparse_study_accuracy"
    ].panels
    lines = {line.label: line.points for line in panel.lines}
    assert [line.label for line in panel.lines] == ["dense", "bsr", "supermask"]
    assert [(p.x, round(p.y, 2)) for p in lines["bsr"]] == [(0.8, 98.1), (0.9, 97.5)]
    assert lines["bsr"][0].low == pytest.approx(97.9)
    assert panel.y.rule == pytest.approx(98.4)


def test_every_target_is_judged_by_its_own_points(results):
    found = judged(results)
    assert list(found) == [f"B{i}" for i in range(1, 9)]
    expected = {"B1": 4, "B2": 4, "B3": 2, "B4": 1, "B5": 2, "B6": 1, "B7": 1, "B8": 2}
    assert {name: len(one.deciding) for name, one in found.items()} == expected
    for name, one in found.items():
        if name not in ("B2", "B3"):
            assert {judgement.status for judgement in one.deciding} == {HOLDS}, name
    lines = [judgement.line for judgement in found["B1"].deciding]
    assert lines[0] == "bsr (block 32, s = 0.8)"
    assert {len(judgement.points) for judgement in found["B1"].deciding} == {8}
    by_tile = {judgement.line: judgement.status for judgement in found["B2"].deciding}
    assert by_tile["bsr (8192 square, 4096 rows, block 64, s = 0.9)"] == HOLDS
    assert [judgement.line for judgement in found["B3"].deciding] == ["bsr (ViT-B)", "bsr (ViT-H)"]
    assert "Holds for plan (block 32, s = 0.8) and plan" in found["B5"].sentence


def test_a_target_that_some_points_miss_is_mixed_and_names_the_worst(tmp_path):
    slow = {c.id: 1e-3 for c in made.cases() if (c.shape, c.block) == ("ViT-H down", 64)}
    slow = {name: took for name, took in slow.items() if "/bsr-" in name and "s0.9" in name}
    found = judged(read(tmp_path, made.everything(**slow)))["B1"]
    statuses = {judgement.line: judgement.status for judgement in found.deciding}
    assert statuses["bsr (block 64, s = 0.9)"] == MIXED
    assert statuses["bsr (block 64, s = 0.8)"] == HOLDS
    (worst,) = (j for j in found.deciding if j.status == MIXED)
    assert "the worst of 8: ViT-H down, 4096 rows, block 64, s = 0.9" in worst.words


def test_a_target_that_is_missed_fails_and_few_rounds_decide_nothing(tmp_path):
    slow = {c.id: 1e-3 for c in made.cases() if c.phase == "planning" and c.method == "plan"}
    entries = made.everything(**slow)
    found = judged(read(tmp_path, entries))["B5"]
    assert {judgement.status for judgement in found.deciding} == {FAILS}
    for one in entries:
        one["stats"]["data"] = one["stats"]["data"][:3]
    few = judged(read(tmp_path, entries))["B5"]
    assert {judgement.status for judgement in few.deciding} == {UNDECIDED}


def test_without_results_a_verdict_says_what_it_needs(tmp_path):
    one = made.cases()[0]
    found = judged(read(tmp_path, [made.entry(one, [one])]))
    assert all(verdict.sentence.startswith("Not measured: it needs ") for verdict in found.values())


def test_accuracy_is_judged_over_the_seeds_that_dense_has(tmp_path):
    worse = made.trained({0.0: 98.4, 0.8: 97.3, 0.9: 96.5})
    found = judged(read(tmp_path, worse))["B8"]
    statuses = {j.line.partition(" (")[0]: j.status for j in found.deciding}
    assert statuses == {"bsr, s = 0.8": FAILS, "bsr, s = 0.9": HOLDS}
    assert "+1.10 points below dense, over 3 seeds (limit 1)" in found.deciding[0].words
    assert [j.line.partition(",")[0] for j in found.beside] == ["supermask", "supermask"]
    lacking = [one for one in worse if one["extra_info"]["case"]["seed"] or one is not worse[0]]
    found = judged(read(tmp_path, lacking))["B8"]
    assert {judgement.status for judgement in found.deciding} == {UNDECIDED}
    assert trained(read(tmp_path, lacking))[0][1].below is None


def test_speed_is_over_the_methods_of_the_same_point(results):
    points = by_place(of_phase(results, "forward")).values()
    here = next(
        p for p in points if where(p[0].case) == "8192 square, 4096 rows, block 64, s = 0.9"
    )
    ours = of_method("bsr", here)
    assert speed(ours, here).value == pytest.approx(5.8, rel=0.01)
    assert speed(ours, here, "torch_bsr").value == pytest.approx(1.8, rel=0.01)
    assert speed(of_method("dense", here), here) is None


def test_tables_have_every_case_and_the_readme_the_main_layers(results):
    rows = {row["id"] for table in tables(results) for row in table.rows}
    assert rows == {result.id for result in results.results}
    written = readme(results)
    assert "8192 square" in written.table
    assert "ViT-H down" in written.table
    assert written.setting == "bf16"
    assert len(full(results)) == 6
    assert "| top-1 % |" in full(results)[-1].table


def test_the_tools_take_its_files(file, tmp_path):
    assert plot.main([file, "-o", str(tmp_path / "plots")]) == 0
    assert verdict.main([file, "--out", str(tmp_path / "verdict")]) == 0
    assert report.main([file, "-o", str(tmp_path / "report.html")]) == 0
    assert "Block-sparse layers" in (tmp_path / "report.html").read_text()
    page = tmp_path / "PAGE.md"
    page.write_text("<!-- block_sparse:begin -->\n<!-- block_sparse:end -->\n")
    assert summary.main([file, "--readme", str(page)]) == 0
    assert "| 8192 square |" in page.read_text()


LOG = """step,images,loss,top1,val_loss,sparsity,lr,grad_norm,images_per_s,seconds,memory_mib
50,3200,2.0,,,0.5,0.002,1.0,1600,2,
100,6400,1.0,97.5,0.1,0.8,0.0,1.0,1600,4,
"""


@pytest.fixture
def run(tmp_path):
    """Makes the folder of a run: run(name, sparsity, seed, evaluation changes)."""

    def write(name, sparsity=0.8, seed=0, settings=(), model=(), **changed):
        folder = tmp_path / name
        folder.mkdir()
        sizes = {"width": 64, "hidden": None, "depth": 4, "heads": 4, "patch": 2, "image": 8}
        train = {"steps": 100, "batch": 64, "accumulate": 1, "seed": seed, "lr": 0.002}
        config = {
            "run": name,
            "device": "auto",
            "data": {"source": "digits", "workers": 8},
            "model": sizes | dict(model),
            "sparse": {"linear": sparsity, "block": 16},
            "train": train | dict(settings),
            "log": {"every": 50},
            "use": {"storage": "bsr"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "log.csv").write_text(LOG)
        accuracy = {"top1": 97.5, "top5": 100.0, "loss": 0.1, "images": 360}
        found = {
            "step": 100,
            "storage": "bsr" if sparsity else "dense",
            "dtype": "float32",
            "folded": accuracy,
            "converted": accuracy | {"top1": 97.0},
            "apart": 1e-7,
            "machine": {"device": "CPU (1 gloo ranks)", "kind": "cpu", "ranks": 1},
            "commit_info": {"id": "a" * 40, "dirty": False},
        }
        (folder / "evaluation.json").write_text(json.dumps(found | changed))
        return folder

    return write


def test_runs_become_a_file_that_the_tools_read(run, tmp_path, capsys):
    folders = [run(f"{s}-{seed}", s, seed) for s in (0.0, 0.8, 0.9) for seed in (0, 1)]
    out = tmp_path / "study.json"
    assert study.main([*map(str, folders), "--out", str(out)]) == 0
    assert "has 10 cases of 6 runs" in capsys.readouterr().out
    loaded = load(out)
    (models,) = trained(loaded)
    assert [(one.method, one.sparsity) for one in models] == [
        ("dense", 0.0),
        ("bsr", 0.8),
        ("bsr", 0.9),
        ("supermask", 0.8),
        ("supermask", 0.9),
    ]
    assert models[1].below == pytest.approx(0.5)
    assert models[3].below == 0
    assert loaded.results[0].samples == (0.04, 0.04)
    assert loaded.commits == ("aaaaaaa",)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": 50}, r"was evaluated at step 50 of 100: train it to its end"),
        ({"machine": None}, r"has no machine where a run writes it"),
        ({"folded": {}}, r"has no top1 where a run writes it"),
    ],
)
def test_a_run_that_is_not_whole_is_refused(run, changed, message):
    with pytest.raises(ToolError, match=message):
        study.gathered([run("a", **changed)])


def test_runs_that_are_not_evaluated_alike_or_elsewhere_are_refused(run):
    first = run("a")
    with pytest.raises(ToolError, match=r"a and .*b are of one sparsity, recipe and seed"):
        study.gathered([first, run("b")])
    there = {"device": "1x NVIDIA H100", "kind": "cuda", "ranks": 1}
    with pytest.raises(ToolError, match=r"evaluate them on one kind"):
        study.gathered([first, run("c", seed=1, machine=there)])
    (first / "evaluation.json").unlink()
    with pytest.raises(ToolError, match=r"has no evaluation.json: run its `evaluate` first"):
        study.gathered([first])


def test_a_model_that_is_named_by_its_shape_has_the_sizes_that_were_evaluated(run):
    named = dict.fromkeys(("width", "hidden", "depth", "heads", "patch"))
    sizes = {"width": 768, "hidden": 3072, "depth": 12, "heads": 12, "patch": 16, "image": 224}
    case = study.entries(run("a", model=named, sizes=sizes))[0]["extra_info"]["case"]
    assert (case["N"], case["K"], case["depth"], case["image"]) == (3072, 768, 12, 224)
    with pytest.raises(ToolError, match=r"has no width where a run writes it"):
        study.entries(run("b", model=named))


def test_other_settings_make_another_recipe(run, tmp_path):
    folders = [run("a"), run("b", seed=1), run("c", settings={"lr": 0.1})]
    recipes = [study.entries(folder)[0]["extra_info"]["case"]["recipe"] for folder in folders]
    assert recipes[0] == recipes[1] != recipes[2]
    out = tmp_path / "study.json"
    study.main([*map(str, folders), "--out", str(out)])
    assert len(trained(load(out))) == 2
