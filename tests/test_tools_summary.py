"""The README's tables say what was compared, and the schema describes every field."""

import json
import re
from pathlib import Path

from tests import synthetic_results as synthetic
from tests.test_tools_variants import DENSE, grid, read
from tools import summary
from tools.cases import over
from tools.families.linear.readme_tables import forward_table, training_table

ROOT = Path(__file__).parents[1]


def columns(table):
    return [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]


def cell(table, row, column):
    cells = table.splitlines()[2 + row].strip("|").split("|")
    return cells[columns(table).index(column)].strip()


def test_the_forward_table_has_a_column_for_each_question(tmp_path):
    entries = synthetic.everything((4096, 8192), (64,), variants=synthetic.VARIANTS)
    text, table = forward_table(read(tmp_path, entries))
    assert text == "bf16"
    masks = ("tile", "1100", "tile_magnitude")
    assert columns(table) == [
        "N",
        "B",
        "dense_single",
        "dense_tp_row",
        "dense_tp_row, best other reduce",
        "block_shock (tile)",
        "block_shock (1100)",
        "block_shock (tile_magnitude)",
        "block_shock · cusparselt",
        "masked_split",
        "block_shock_folded",
        *(f"block_shock ({mask}) / dense_tp_row" for mask in masks),
        *(f"block_shock ({mask}) / dense_tp_row, same reduce" for mask in masks),
    ]
    assert len(table.splitlines()) == 4
    assert cell(table, 0, "dense_tp_row, best other reduce").endswith("(auto)")


def test_columns_without_a_value_are_left_out_and_added_methods_are_not(tmp_path):
    lines = [*DENSE, ("block_shock", {}, 0.5), ("mine", {}, 2.0)]
    table = forward_table(read(tmp_path, grid(lines)))[1]
    assert columns(table) == ["N", "B", "dense_tp_row", "block_shock", "mine"] + [
        f"{name} / dense_tp_row" for name in ("block_shock", "mine")
    ]
    assert cell(table, 3, "mine / dense_tp_row").startswith("2.000 [")


def test_the_training_table_compares_policies_for_each_optimizer(tmp_path):
    results = read(tmp_path, synthetic.everything((4096,), (64,), variants=synthetic.VARIANTS))
    _, table = training_table(results)
    assert columns(table)[:6] == [
        *("N", "B", "optimizer", "dense_tp_row"),
        *("block_shock · packed_master (tile)", "block_shock · packed_master (1100)"),
    ]
    assert [cell(table, row, "optimizer") for row in (0, 1)] == ["adam", "sgd"]
    found = {(r.label, r.case.optimizer): r for r in results.of("training")}
    shock, dense = (found[name, "sgd"] for name in ("block_shock · packed_master", "dense_tp_row"))
    assert cell(table, 1, "packed_master (tile) / dense_tp_row") == str(over(shock, dense))
    other = found["dense_tp_row · auto reduce", "sgd"]
    assert cell(table, 1, "packed_master (tile) / dense_tp_row, same reduce") == str(
        over(shock, other)
    )


def test_each_device_and_number_of_ranks_has_its_section(tmp_path, capsys):
    two = synthetic.write(tmp_path / "2.json", grid([*DENSE, ("block_shock", {}, 0.5)]))
    more = synthetic.write(tmp_path / "again.json", grid([("masked_split", {}, 2.0)]))
    machine = synthetic.document(grid(DENSE, ranks=4), device="4x NVIDIA H200")
    machine["machine_info"]["blockshock"]["ranks"] = 4
    four = tmp_path / "4.json"
    four.write_text(json.dumps(machine))
    assert summary.main([two, str(four), more]) == 0
    printed = capsys.readouterr().out
    first, second = printed.split("### ")[1:]
    assert first.startswith("2x NVIDIA H200\n")
    assert second.startswith("4x NVIDIA H200, 4 ranks\n")
    assert "masked_split" in first
    assert ("H1 holds" in first, "H1" in second) == (True, False)
    assert summary.main([two]) == 0
    assert "###" not in capsys.readouterr().out


def test_the_schema_describes_every_field_of_a_result():
    schema = (ROOT / "tools" / "SCHEMA.md").read_text()
    described = set(re.findall(r"`([A-Za-z0-9_]+)`", schema)) | {"blockshock"}
    files = [json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")]
    files.append(synthetic.document(synthetic.everything((64,), (1,))))
    assert len(files) > 1
    for content in files:
        machine = content["machine_info"]["blockshock"]
        assert set(machine) | set(machine["ceilings"]) <= described
        for entry in content["benchmarks"]:
            info = entry["extra_info"]
            parts = [info, info["case"], info["regions"], info["errors"]]
            parts += [info[name] for name in ("timing", "memory", "rates", "floor")]
            assert {key for part in parts for key in part} <= described
    assert {"usual", "kernel", "reduce", "build_peak_bytes", "profile"} <= described
