"""Reading results: what is right is read, what is wrong is one clear line."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import synthetic_results as synthetic
from tools import compare, plot, report, results, summary, verdict
from tools.files import ToolError, run, save
from tools.tables import Column, Table, as_csv, as_markdown, as_text, number, seconds, size

TOOLS = {"plot": plot, "compare": compare, "verdict": verdict, "report": report, "summary": summary}


@pytest.fixture
def good(tmp_path):
    entries = [synthetic.entry(method, 4096, 64) for method in synthetic.METHODS]
    return synthetic.write(tmp_path / "good.json", entries)


def test_every_case_of_a_file_is_read(good):
    loaded = results.load(good)
    assert [result.case.method for result in loaded.results] == list(synthetic.METHODS)
    assert loaded.device == "2x NVIDIA H200"
    assert loaded.results[0].regions["forward"].p95 > 0


def test_median_and_samples_are_what_was_written(tmp_path):
    data = [3.0, 1.0, 2.0, 10.0]
    path = synthetic.write(tmp_path / "a.json", [synthetic.entry("dense_single", 64, 1, data=data)])
    (result,) = results.load(path).results
    assert result.samples == tuple(data)
    assert result.median == 2.5


def test_a_case_has_the_fields_of_its_file_and_no_others(tmp_path):
    entry = synthetic.entry("dense_single", 64, 1)
    entry["extra_info"]["case"] |= {"heads": 16, "tile": [128, 64]}
    del entry["extra_info"]["case"]["K"]
    loaded = results.load(synthetic.write(tmp_path / "a.json", [entry]))
    case = loaded.results[0].case
    assert (case.N, case.heads, case.tile, case.K, case.depth) == (64, 16, "[128, 64]", None, None)
    assert copy.copy(case) == case
    assert len({case, case.but(heads=16), case.but(heads=8)}) == 2
    assert loaded.of("forward") == ()  # without a size it has no place in figures


def _cut(text):
    return text[: len(text) // 2]


def _changed(change):
    def apply(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return apply


def _first(content):
    return content["benchmarks"][0]


BROKEN = {
    "cut short": (_cut, "not JSON, or was cut short"),
    "empty": (lambda text: "", "is empty"),
    "a picture": (lambda text: "\x00\x01", "not JSON"),
    "a list": (lambda text: "[]", "no benchmark file"),
    "no benchmarks": (_changed(lambda c: c.update(benchmarks=[])), "has no benchmarks"),
    "no schema": (_changed(lambda c: _first(c)["extra_info"].pop("schema")), "has no schema"),
    "no extra_info": (_changed(lambda c: _first(c).pop("extra_info")), "has no schema"),
    "a later schema": (
        _changed(lambda c: _first(c)["extra_info"].update(schema=2)),
        "has schema 2, these tools read 1",
    ),
    "no device": (_changed(lambda c: c["machine_info"].pop("blockshock")), "which device"),
    "no samples": (_changed(lambda c: _first(c)["stats"].pop("data")), "--benchmark-save-data"),
    "a NaN time": (_changed(lambda c: _first(c)["stats"]["data"].append(float("nan"))), "nan s"),
    "a negative time": (_changed(lambda c: _first(c)["stats"]["data"].append(-1)), "-1 s"),
    "a size in words": (
        _changed(lambda c: _first(c)["extra_info"]["case"].update(N="4k")),
        "N='4k'",
    ),
    "an id twice": (
        _changed(lambda c: c["benchmarks"].append(copy.deepcopy(_first(c)))),
        "is there twice",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(good, tmp_path, fault):
    breaks, message = BROKEN[fault]
    path = tmp_path / "broken.json"
    path.write_text(breaks(Path(good).read_text()))
    with pytest.raises(ToolError) as caught:
        results.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_fault(good, tmp_path):
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + Path(good).read_bytes())
    loaded = [result.samples for result in results.load(good).results]
    assert [result.samples for result in results.load(path).results] == loaded


def test_a_terminal_that_knows_ascii_only_shows_question_marks(tmp_path):
    old, new = (
        synthetic.write(tmp_path / name, [synthetic.entry("dense_single", 64, 1)])
        for name in ("old.json", "müde.json")
    )
    content = json.loads(Path(new).read_text())
    content["machine_info"]["blockshock"]["torch"] = "3"
    Path(new).write_text(json.dumps(content))
    ended = subprocess.run(
        [sys.executable, "-m", "tools.compare", old, new],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        cwd=Path(__file__).parents[1],
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b" ? 3." in ended.stdout


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ToolError, match="cannot be read"):
            results.load(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_to_a_file_gives_anything_but_results_or_one_line(tmp_path_factory, data):
    text = json.dumps(synthetic.document([synthetic.entry("block_shock", 4096, 64)]))
    start = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 60))
    put = data.draw(st.text(alphabet='{}[]",:0e-nulltrue', max_size=6))
    path = tmp_path_factory.mktemp("damaged") / "a.json"
    path.write_text(text[:start] + put + text[start + length :])
    errors = []
    try:
        results.load(path)
    except ToolError as error:
        errors.append(str(error))
    assert not any("\n" in error for error in errors)


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_ends_a_wrong_input_with_one_line_and_code_2(
    name, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "cut.json"
    path.write_text('{"benchmarks": [')
    arguments = [str(path)] * (2 if name == "compare" else 1)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        run(TOOLS[name].main)
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_files_of_different_devices_are_not_put_together(good, tmp_path):
    entries = [synthetic.entry("dense_single", 64, 1)]
    other = synthetic.write(tmp_path / "cpu.json", entries, kind="cpu")
    with pytest.raises(ToolError, match="give files of one device"):
        results.load_all([good, other])


def test_a_case_in_two_files_is_taken_from_the_later_one_and_said(good, tmp_path):
    again = [synthetic.entry("dense_single", 4096, 64, data=[1.0, 1.0])]
    loaded = results.load_all([good, synthetic.write(tmp_path / "later.json", again)])
    assert loaded.results[0].median == 1.0
    assert len(loaded.results) == len(synthetic.METHODS)
    assert "cases in more than one file: 1" in loaded.notes[0]


def test_tools_need_neither_torch_nor_blockshock():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['blockshock'] = None\n"
        "import tools.plot, tools.compare, tools.verdict, tools.report, tools.summary"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "out.txt"
    save(path, "before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ToolError, match="No space left on device; nothing was changed"):
        save(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolError, match="was not written"):
        save(tmp_path / "file" / "out.txt", "text")


def test_tables_hold_every_row_and_escape_what_is_markup():
    columns = (Column("name", "name"), number("value", "value", lambda v: f"{v:.1f}"))
    rows = [{"name": "<b>|x", "value": 1.25}, {"name": "y"}]
    assert as_text(columns, rows).count("\n") == 3
    assert "\\|x" in as_markdown(columns, rows)
    assert "1.25" in as_csv(columns, rows)


@given(st.floats(1e-9, 900))
def test_times_are_written_to_three_digits(value):
    scales = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}
    written, unit = seconds(value).split()
    assert float(written) * scales[unit] == pytest.approx(value, rel=5e-3)
    assert float(written) < 1000


@given(st.integers(1, 2**45))
def test_sizes_are_written_to_three_digits(value):
    written, unit = size(value).split()
    scale = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert float(written) * scale == pytest.approx(value, rel=5e-3)


def test_a_table_of_the_report_says_once_what_all_its_rows_share():
    columns = (Column("a", "first"), number("b", "second"), Column("c", "third"))
    rows = [{"a": "x", "b": i} for i in range(12)]
    table = Table("t", columns, rows, note="A note.")
    assert [column.title for column in table.columns] == ["second"]
    assert table.words == "A note. In every row: first x."
    assert [[text for _, text in row] for row in table.cells] == [[str(i)] for i in range(12)]
    short = Table("t", columns, rows[:3])
    assert ([column.title for column in short.columns], short.words) == (["first", "second"], "")
