"""Data parallelism in the tools: what is compared, what is drawn, and the curve of a run."""

import pytest

from tests import synthetic_data_parallel as made
from tools import compare, plot, report
from tools.curves import curve
from tools.drawing import render
from tools.families import FAMILIES, held
from tools.families.data_parallel.page import full, readme, tables
from tools.families.data_parallel.points import (
    NAMING,
    OPENWEBTEXT,
    by_place,
    efficiency,
    epoch_hours,
    of_phase,
    over_peer,
)
from tools.family import draw_all
from tools.files import ToolError
from tools.results import load

FIGURES = FAMILIES["data_parallel"].figures
LOG = """step,tokens,loss,val_loss,lr,grad_norm,tokens_per_s,mfu,seconds,memory_mib
10,1000,5.5,,0.1,1.0,1000,0.3,60,100
20,2000,4.5,4.75,0.1,1.0,1200,0.31,120,100
30,3000,4.25,,0.1,1.0,1300,0.32,180,100
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return made.write(tmp_path_factory.mktemp("made") / "dp.json", made.everything())


@pytest.fixture(scope="module")
def results(file):
    return load(file)


@pytest.fixture
def log(tmp_path):
    (tmp_path / "small").mkdir()
    path = tmp_path / "small/log.csv"
    path.write_text(LOG)
    return str(path)


def read(tmp_path, entries):
    return load(made.write(tmp_path / "a.json", entries))


@pytest.mark.slow
def test_every_figure_is_drawn_and_says_device_and_setting(results):
    drawings, absent = draw_all(results, FAMILIES["data_parallel"])
    assert not absent
    assert [drawing.name for drawing in drawings] == list(FIGURES)
    for drawing in drawings:
        assert drawing.subtitle == "2x NVIDIA H200 · bf16, 2 ranks, compiled"
        assert len(render.png(drawing)) > 5_000


def test_bars_have_the_values_of_their_results(results):
    drawings = {d.name: d for d in draw_all(results, FAMILIES["data_parallel"])[0]}

    def value(figure, label, place=0):
        (panel,) = drawings[f"data_parallel_{figure}"].panels
        (line,) = (line for line in panel.lines if line.label == label)
        return next(point.y for point in line.points if point.x == place)

    assert value("training_scaling", "overlapped") == pytest.approx(100 / 1.03, abs=0.3)
    assert value("gradients_communication", "naive") == pytest.approx(100 - 100 / 1.16, abs=0.3)
    assert value("training_memory", "torch_fsdp") < value("training_memory", "torch_ddp")
    (result,) = (r for r in of_phase(results, "training") if r.id.startswith(
        "data_parallel_training/flat-768"))  # fmt: skip
    assert value("training_time", "flat") == 1e3 * result.median
    hours = OPENWEBTEXT / result.rates["tokens_per_s"] / 3600
    assert value("training_epoch", "flat") == epoch_hours(result) == hours
    names = drawings["data_parallel_lm_throughput"].panels[0].names
    assert names[0] == "124M\n32 × 1024\nblock_sparse"
    assert len(names) == 3


def test_sizes_of_buckets_are_lines_of_their_own_figure_alone(results):
    drawings = {d.name: d for d in draw_all(results, FAMILIES["data_parallel"])[0]}
    assert "overlapped · 5MiB" not in drawings["data_parallel_training_time"].labels
    lines = drawings["data_parallel_training_vs_bucket"].panels[0].lines
    (overlapped,) = (line for line in lines if line.label == "overlapped")
    assert [point.x for point in overlapped.points] == [5, 25, 100]
    assert lines[-1].label == "none"
    assert lines[-1].bound


def test_losses_that_are_the_same_are_one_line(results):
    drawings = {d.name: d for d in draw_all(results, FAMILIES["data_parallel"])[0]}
    labels = drawings["data_parallel_lm_losses"].labels
    assert any("naive ≈ flat" in label for label in labels)


def test_a_ratio_is_of_the_same_model_attention_and_setting(tmp_path):
    entries = [
        made.entry("none"),
        made.entry("overlapped"),
        made.entry("torch_ddp", attention="flash_triton"),
        made.entry("overlapped", "308M"),
    ]
    found = by_place(of_phase(read(tmp_path, entries), "training"))
    assert sorted(len(here) for here in found.values()) == [1, 1, 2]
    for here in found.values():
        for result in here:
            expected = len(here) == 2 and result.case.method != "none"
            assert (efficiency(result, here) is not None) == expected
            assert over_peer(result, here) is None


def test_what_is_missing_is_said(tmp_path):
    results = read(tmp_path, [made.entry("flat")])
    drawn, absent = draw_all(results, FAMILIES["data_parallel"])
    assert {d.name for d in drawn} == {
        f"data_parallel_training_{kind}" for kind in ("time", "throughput", "memory", "epoch")
    }
    assert "needs two bucket sizes" in absent["data_parallel_training_vs_bucket"]
    assert "no results of gradients" in absent["data_parallel_gradients_time"]
    assert readme(results) is None


def test_a_run_s_neighbours_are_known_by_their_labels(results):
    labels = {r.run_label for r in results.results}
    assert {"overlapped", "overlapped-5MiB", "fully_sharded-compute=bf16"} <= labels
    assert {r.case.method for r in results.results} == set(NAMING.methods)


def test_tables_have_every_case_and_the_readme_the_largest_model(results):
    rows = [row for table in tables(results) for row in table.rows]
    assert len(rows) == len(results.results)
    (row,) = (r for r in rows if r["id"].startswith("data_parallel_training/torch_ddp-768"))
    assert row["model"] == "124M"
    assert row["mfu_datasheet"] == pytest.approx(row["mfu"] * 700 / 989)
    assert row["efficiency"].value == pytest.approx(1 / 1.035, rel=0.01)
    written = readme(results)
    assert "772M, 8 sequences" in written.words
    assert written.table.count("\n") == 9  # eight methods
    assert "torch_fsdp" in written.table
    assert sum(one.table.count("\n") - 1 for one in full(results)) == 27 + 28 + 27


@pytest.mark.slow
def test_a_file_goes_through_every_tool(file, log, tmp_path, capsys):
    assert plot.main([file, log, "-o", str(tmp_path / "plots")]) == 0
    assert (tmp_path / "plots/loss_small.png").stat().st_size > 5_000
    assert (tmp_path / "plots/data_parallel_lm_memory.svg").exists()
    assert report.main([file, log, "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "Data parallelism: tables" in text
    assert "Training runs: the main plot" in text
    assert compare.main([file, file]) == 0
    assert list(held(load(file))) == ["data_parallel"]


def test_the_curve_of_a_run_has_both_losses(log):
    drawing = curve(log)
    (panel,) = drawing.panels
    points = {line.label: [(p.x, p.y) for p in line.points] for line in panel.lines}
    assert points == {
        "training": [(10, 5.5), (20, 4.5), (30, 4.25)],
        "validation": [(20, 4.75)],
    }
    assert drawing.name == "loss_small"
    assert drawing.subtitle == (
        "3.00 k tokens · 3.0 minutes · 1.30 k tokens/s at the end · MFU 32.0%"
    )


def test_a_curve_alone_is_plotted_and_no_report(log, tmp_path):
    assert plot.main([log, "-o", str(tmp_path)]) == 0
    assert (tmp_path / "loss_small.svg").exists()
    with pytest.raises(ToolError, match="a report needs a benchmark JSON file"):
        report.main([log])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no loss and no step in its rows"),
        ("step,lr\n1,2\n", "has no loss in its rows"),
        ("step,loss\n1,\n", "has no loss in any row"),
        ("step,loss\n1,nan\n", "has loss = 'nan', which is no finite number"),
        ("step,loss\none,2\n", "has step = 'one', which is no finite number"),
        ("step,loss,mfu\n1,2,no\n", "has mfu = 'no', which is no finite number"),
    ],
)
def test_a_file_that_is_no_log_is_one_line(tmp_path, text, message):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(ToolError, match=message):
        curve(str(tmp_path / "log.csv"))
