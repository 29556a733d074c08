"""The README and results/README.md say what was compared, and the schema describes every field."""

import json
import re
from pathlib import Path

import pytest

from tests import synthetic_attention
from tests import synthetic_results as synthetic
from tests.test_tools_variants import DENSE, grid, read
from tools import summary
from tools.cases import over
from tools.drawing.style import spread
from tools.families.linear.readme_tables import full, readme
from tools.family import README_COLUMNS, README_ROWS
from tools.files import ToolError
from tools.results import load

ROOT = Path(__file__).parents[1]
SETS = ("h200x2_*", "h200x4", "h200_attention_*")


def columns(table):
    return [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]


def cell(table, row, column):
    cells = table.splitlines()[2 + row].strip("|").split("|")
    return cells[columns(table).index(column)].strip()


def place(name, text="old"):
    return f"<!-- {name}:begin -->\n{text} {name}\n<!-- {name}:end -->\n"


def between(text, name):
    return text.split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    entries = synthetic.everything((4096, 8192), (64,), variants=synthetic.VARIANTS)
    return synthetic.write(tmp_path_factory.mktemp("linear") / "linear.json", entries)


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    path = tmp_path_factory.mktemp("attention") / "attention.json"
    return synthetic_attention.read_write(path, synthetic_attention.everything())


def test_the_full_tables_have_a_column_for_each_question(linear):
    times, ratios, same, *training, choices = full(load(linear))
    masks = ("tile", "1100", "tile_magnitude")
    assert columns(times.table) == [
        "N",
        "B",
        "dense_single",
        "dense_tp_row",
        "dense_tp_row, best other sum",
        "block_shock (tile)",
        "block_shock (1100)",
        "block_shock (tile_magnitude)",
        "block_shock · cusparselt",
        "masked_split",
        "block_shock_folded",
    ]
    assert (times.setting, len(times.table.splitlines())) == ("bf16", 4)
    assert cell(times.table, 0, "dense_tp_row, best other sum").endswith("(auto)")
    assert columns(ratios.table)[2:] == [f"block_shock ({m}) / dense_tp_row" for m in masks]
    assert columns(same.table)[2:] == [f"block_shock ({m}) / dense_tp_row, same sum" for m in masks]
    assert [written.words.split(":")[0] for written in training] == ["Training"] * 3
    assert "Best by name" in choices.words


def test_columns_without_a_value_are_left_out_and_added_methods_are_not(tmp_path):
    lines = [*DENSE, ("block_shock", {}, 0.5), ("mine", {}, 2.0)]
    times, ratios = full(read(tmp_path, grid(lines)))
    assert columns(times.table) == ["N", "B", "dense_tp_row", "block_shock", "mine"]
    assert columns(ratios.table)[2:] == [f"{m} / dense_tp_row" for m in ("block_shock", "mine")]
    assert cell(ratios.table, 3, "mine / dense_tp_row").startswith("2.000 [")


def test_the_training_table_compares_policies_for_each_optimizer(linear):
    results = load(linear)
    times, ratios, same, choices = full(results)[3:]
    assert columns(choices.table)[-1] == "auto / best by name"
    assert columns(times.table)[:6] == [
        *("N", "B", "optimizer", "dense_tp_row"),
        *("block_shock · packed_master (tile)", "block_shock · packed_master (1100)"),
    ]
    assert [cell(times.table, row, "optimizer") for row in (0, 1)] == ["adam", "sgd"]
    found = {(r.label, r.case.optimizer): r for r in results.of("training") if r.case.N == 4096}
    shock, dense = (found[name, "sgd"] for name in ("block_shock · packed_master", "dense_tp_row"))
    assert cell(ratios.table, 1, "packed_master (tile) / dense_tp_row") == str(over(shock, dense))
    other = found["dense_tp_row · auto reduce", "sgd"]
    assert cell(same.table, 1, "packed_master (tile) / dense_tp_row, same sum") == str(
        over(shock, other)
    )


def test_the_readme_table_of_linear_layers_has_the_faster_dense_tp_and_both_masks(linear):
    results = load(linear)
    table = readme(results).table
    assert columns(table) == [
        "N",
        "B",
        "dense TP (NCCL) ms",
        "dense TP best sum ms",
        "block_shock 1100 ms",
        "block_shock tile ms",
        "1100 / dense TP (NCCL)",
        "tile / dense TP (NCCL)",
    ]
    at = {r.label: r for r in results.of("forward") if r.case.N == 4096}
    dense = min((at["dense_tp_row"], at["dense_tp_column"]), key=lambda r: r.median)
    ratio = over(at["block_shock · 1100"], dense)
    assert cell(table, 0, "1100 / dense TP (NCCL)") == str(ratio)
    assert cell(table, 0, "dense TP best sum ms").endswith("(auto)")


@pytest.mark.parametrize(
    ("places", "shown"),
    [
        ([(n, b) for n in (1, 2, 3) for b in (16, 64)], {16, 64}),
        # the two B measured at most N; of equals the largest, then the smallest
        ([(n, b) for n in (1, 2) for b in (16, 64, 1024)] + [(3, 64)], {64, 16}),
        ([(n, b) for n in (1, 2, 3) for b in (16, 64, 1024, 4096)], {4096, 16}),
        ([(n, 64) for n in range(1, 20)], {64}),
    ],
)
def test_the_readme_shows_the_most_measured_b_and_n_from_end_to_end(tmp_path, places, shown):
    entries = [
        synthetic.entry(method, 256 * n, b)
        for n, b in places
        for method in ("dense_tp_row", "dense_tp_column", "block_shock")
    ]
    rows = readme(read(tmp_path, entries)).table.splitlines()[2:]
    found = [tuple(map(int, row.strip("| ").split(" | ")[:2])) for row in rows]
    assert 0 < len(found) <= README_ROWS
    assert {b for _, b in found} == ({1024, 16} if len(places) == 7 and 64 not in shown else shown)
    ends = [n for n, b in places if b in shown]
    assert {found[0][0], found[-1][0]} == {256 * min(ends), 256 * max(ends)}


def test_a_spread_keeps_both_ends():
    assert spread([1, 2, 3], 3) == [1, 2, 3]
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(10), 1) == [0]
    assert spread([], 4) == []


def test_each_family_has_one_short_table_between_its_own_markers(
    tmp_path, linear, attention, capsys
):
    page = tmp_path / "README.md"
    before = f"# Title\n\n{place('linear')}\nMiddle\n{place('attention')}\nEnd.\n"
    page.write_text(before)
    options = [linear, attention, "--readme", str(page)]
    assert summary.main([*options, "--check"]) == 1
    assert page.read_text() == before
    assert summary.main(options) == 0
    after = page.read_text()
    assert summary.main([*options, "--check"]) == 0
    assert summary.main(options) == 0
    assert page.read_text() == after
    assert re.sub(r"(begin -->\n).*?(\n<!--)", r"\1\2", after, flags=re.DOTALL) == (
        before.replace("old linear", "").replace("old attention", "")
    )
    for name, card in (("linear", "2x NVIDIA H200, 2 ranks"), ("attention", "1x NVIDIA H200")):
        caption, table = between(after, name).split("\n\n")
        assert f"{card}; PyTorch 2.11.0" in caption
        assert "; commit 0000000; 2026-01-01." in caption
        assert "device time" in caption
        assert len(columns(table)) <= README_COLUMNS
        assert 0 < len(table.splitlines()) - 2 <= README_ROWS
    assert "out of date" in capsys.readouterr().out


def test_the_attention_table_compares_ours_with_pytorchs_fastest(attention):
    written = summary.readme_tables([load(attention)])["attention"]
    table = written.split("\n\n")[1]
    rows = range(len(table.splitlines()) - 2)
    masks = [cell(table, row, "mask") for row in rows]
    assert masks[0] == "full"
    assert sum(mask not in ("full", "causal") for mask in masks) == 4
    for row in rows:
        ours, theirs = (cell(table, row, name) for name in ("ours, ms", "PyTorch's fastest, ms"))
        pattern = masks[row] not in ("full", "causal")
        assert ("block_sparse" if pattern else "flash_triton") in ours
        assert ("flex" in theirs) or not pattern
        ratio = float(theirs.split()[0]) / float(ours.split()[0])
        told = float(cell(table, row, "speed: ours / PyTorch's").split()[0])
        assert told == pytest.approx(ratio, rel=0.02)


def test_a_caption_names_the_commits_of_its_own_files(tmp_path, linear, attention):
    content = json.loads(Path(attention).read_text())
    content["machine_info"] = json.loads(Path(linear).read_text())["machine_info"]
    content["commit_info"] = {"id": "1" * 40, "dirty": False}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    made = summary.tables_of_files([str(linear), str(other)])
    assert "commit 0000000;" in made["linear"]
    assert "commit 1111111;" in made["attention"]


def test_a_family_without_its_markers_is_left_out_and_told(tmp_path, linear, attention, capsys):
    page = tmp_path / "README.md"
    page.write_text(place("attention"))
    assert summary.main([linear, attention, "--readme", str(page)]) == 0
    assert "no lines <!-- linear:begin --> and <!-- linear:end -->: linear is left out" in (
        capsys.readouterr().out
    )
    assert "old attention" not in page.read_text()
    page.write_text(place("linear") + place("attention"))
    assert summary.main([linear, "--readme", str(page)]) == 0
    assert "old linear" not in page.read_text()
    assert "old attention" in page.read_text()


BEGIN, END = "<!-- linear:begin -->", "<!-- linear:end -->"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no place for the tables of linear"),
        (place("attention"), "has no place for the tables of linear"),
        (BEGIN, "has 1 lines <!-- linear:begin --> and 0 lines"),
        (f"{END}\n{BEGIN}", "exchange them"),
        (2 * f"{BEGIN}{END}", "has 2 lines"),
    ],
)
def test_a_readme_without_its_markers_is_left_alone(linear, tmp_path, text, message):
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(ToolError, match=re.escape(message)):
        summary.main([linear, "--readme", str(page)])
    assert page.read_text() == text


def test_the_first_set_that_has_the_family_is_the_readmes(tmp_path, linear, attention):
    other = tmp_path / "h100.json"
    synthetic.write(other, grid([*DENSE, ("block_shock", {}, 0.5)]), device="2x NVIDIA H100")
    page = tmp_path / "README.md"
    for files, card in (([linear, str(other)], "H200"), ([attention, str(other), linear], "H100")):
        page.write_text(place("linear"))
        summary.main([*files, "--readme", str(page)])
        assert f"2x NVIDIA {card}, 2 ranks" in page.read_text()


def test_every_set_says_card_commit_date_and_files(tmp_path, linear, attention, capsys):
    more = synthetic.write(tmp_path / "again.json", grid([("mine", {}, 2.0)]))
    machine = synthetic.document(grid(DENSE, ranks=4), device="4x NVIDIA H200", ranks=4)
    machine["commit_info"] = {"id": "abcdef0123", "dirty": True}
    four = tmp_path / "4.json"
    four.write_text(json.dumps(machine))
    out = tmp_path / "tables.md"
    options = [linear, str(four), attention, more, "--tables", str(out)]
    assert summary.main([*options, "--check"]) == 1
    assert not out.exists()
    assert summary.main(options) == 0
    text = out.read_text()
    assert summary.main([*options, "--check"]) == 0
    assert text in summary.full_tables(summary.load_by_device(options[:4]))
    first, second, third = text.split("\n## ")[1:]
    assert first.startswith("2x NVIDIA H200, 2 ranks\n")
    assert second.startswith("4x NVIDIA H200, 4 ranks\n")
    assert third.startswith("1x NVIDIA H200\n")
    assert "commit 0000000; 2026-01-01. Files: `linear.json`, `again.json`." in first
    assert "commit abcdef0 + changes; 2026-01-01. Files: `4.json`." in second
    assert "| mine |" in first
    assert "- tile vs dense TP (NCCL): " in first
    assert ("H1" in second, "H1" in third) == (False, False)
    assert summary.main(options[:2]) == 0
    assert "## 4x NVIDIA H200, 4 ranks" in capsys.readouterr().out


def test_a_cpu_has_host_time_and_the_caveat_in_every_caption(tmp_path):
    entries = synthetic.everything((256,), (16,))
    entries += [synthetic_attention.entry(m, 64) for m in ("sdpa_flash", "flash_triton")]
    results = read(tmp_path, entries, kind="cpu")
    made = summary.readme_tables([results])
    assert set(made) == {"linear", "attention"}
    captions = [text.split("\n\n")[0] for text in made.values()]
    text = summary.full_tables([results])
    parts = text.split("\n\n")
    captions += [parts[i - 1] for i, part in enumerate(parts) if part.startswith("| ")]
    assert len(captions) > 5
    assert all(c.startswith("**CPU: says nothing about GPUs.**") for c in captions)
    assert "device time" not in "".join([*captions, text])
    assert "host time" in text
    assert "dense TP (gloo)" in made["linear"]


def test_check_needs_a_file(linear):
    with pytest.raises(ToolError, match="--check needs --readme FILE or --tables FILE"):
        summary.main([linear, "--check"])


def test_the_results_of_this_repository_fill_both_files(tmp_path):
    files = [str(f) for name in SETS for f in sorted((ROOT / "results").glob(f"{name}.json"))]
    assert len(files) > 5
    page, tables = tmp_path / "README.md", tmp_path / "tables.md"
    page.write_text(place("linear") + place("attention"))
    assert summary.main([*files, "--readme", str(page), "--tables", str(tables)]) == 0
    for name in ("linear", "attention"):
        table = between(page.read_text(), name).split("\n\n")[1]
        assert 4 < len(table.splitlines()) - 2 <= README_ROWS
    for table in re.findall(r"(?:^\|.*\n)+", tables.read_text(), flags=re.MULTILINE):
        assert len(columns(table)) <= 13


def test_the_schema_describes_every_field_of_a_result():
    schema = (ROOT / "tools" / "SCHEMA.md").read_text()
    described = set(re.findall(r"`([A-Za-z0-9_]+)`", schema)) | {"blockshock"}
    files = [json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")]
    files.append(synthetic.document(synthetic.everything((64,), (1,))))
    assert len(files) > 1
    for content in files:
        machine = content["machine_info"]["blockshock"]
        assert set(machine) | set(machine.get("ceilings", {})) <= described  # none of a study
        for entry in content["benchmarks"]:
            info = entry["extra_info"]
            names = "case", "regions", "errors", "timing", "memory", "rates", "floor"
            parts = [info, *(info.get(name, {}) for name in names)]
            assert {key for part in parts for key in part} <= described
    assert {"usual", "kernel", "reduce", "build_peak_bytes", "profile"} <= described
