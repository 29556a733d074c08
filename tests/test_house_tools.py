"""No shared room of the tools knows a family: none is named, and a made-up one needs no edit."""

import re
from pathlib import Path

import pytest

from tests import synthetic_results as synthetic
from tests.sixth_family.tools.families.vector_sum import FAMILY
from tools import compare, plot, report, summary, verdict
from tools.cases import interleaved
from tools.families import FAMILIES
from tools.results import load, load_all

TOOLS = Path(report.__file__).parent
SHARED = ("*.py", "drawing/*.py", "templates/*")
LENGTHS = (1000, 4000, 16000)


def named(text):
    """The families and methods that a text names; a method that is an ordinary word, such as
    `reference`, only in quotes.
    """
    methods = {method for family in FAMILIES.values() for method in family.naming.methods}
    # A word of matplotlib as well, and the yardstick of every family's errors.
    methods -= {"none", "dense"}
    words = [*FAMILIES, *(method for method in methods if "_" in method)]
    words.sort(key=len, reverse=True)
    quoted = [f"(?<=[\"']){method}(?=[\"'])" for method in methods]
    return re.findall("|".join([rf"(?<![A-Za-z])(?:{'|'.join(words)})(?![a-z])", *quoted]), text)


def test_no_shared_file_names_a_family_or_a_method():
    files = [file for pattern in SHARED for file in TOOLS.glob(pattern) if file.is_file()]
    assert len(files) > 20
    found = {str(file.relative_to(TOOLS)): named(file.read_text()) for file in files}
    assert {file: words for file, words in found.items() if words} == {}


def test_a_name_is_found_in_code_and_words():
    assert named("from tools.families.linear.page import x") == ["linear"]
    assert named('"dense_tp_row" in a block_shock_folded of attention') == [
        "dense_tp_row",
        "block_shock_folded",
        "attention",
    ]
    assert named('a reference, display: flex; nonlinear, "reference"') == ["reference"]


def sums(path, slow=1.5, **machine):
    """A file of vector sums, as a run of tests/sixth_family writes it."""
    entries = []
    timing = {"mode": "graph", "l2": "warm"}
    partner = {"plain": "halves", "halves": "plain"}
    for phase in ("forward", "twice"):
        for n in LENGTHS:
            for method, factor in (("plain", 1.0), ("halves", slow)):
                name, seconds = f"{method}-n{n}-fp32", 1e-8 * n * factor
                case = {"phase": phase, "method": method, "n": n, "scale": "one", "dtype": "fp32"}
                info = {
                    "schema": 1,
                    "id": f"vector_sum_{phase}/{name}",
                    "case": {"family": "vector_sum", "seed": 0, "ranks": 2} | case,
                    "usual": {},
                    "timing": timing | {"interleaved_with": [partner[method]]},
                    "rates": {"entries_per_s": n / seconds},
                }
                data = synthetic.samples(seconds, seed=n)
                bench = {"name": f"bench_{phase}[{name}]", "group": phase, "extra_info": info}
                entries.append(bench | {"stats": {"data": data}})
    return synthetic.write(path, entries, **machine)


@pytest.fixture
def moved_in(monkeypatch):
    monkeypatch.setitem(FAMILIES, "vector_sum", FAMILY)


@pytest.fixture
def mixed(tmp_path):
    """Sums and linear layers in one file each."""
    entries = [synthetic.entry(m, n, 64) for m in synthetic.METHODS for n in (4096, 8192)]
    return sums(tmp_path / "sums.json"), synthetic.write(tmp_path / "layers.json", entries)


def test_results_of_a_made_up_family_are_read_in_its_order(tmp_path, moved_in):
    results = load(sums(tmp_path / "a.json"))
    forward = [(r.case.n, r.label) for r in results.of("forward")]
    assert forward == [(n, method) for n in LENGTHS for method in ("plain", "halves")]
    assert (results.results[0].case.scale, results.notes) == ("one", ())
    plain, halves = results.of("forward")[:2]
    assert interleaved([halves, plain])


def test_a_made_up_family_goes_through_every_tool(tmp_path, moved_in, mixed, capsys):
    old, layers = mixed
    assert plot.main([old, layers, "-o", str(tmp_path / "plots")]) == 0
    drawn = {path.stem for path in (tmp_path / "plots").glob("*.svg")}
    assert {"vector_sum_vs_n", "forward_vs_N"} <= drawn
    new = sums(tmp_path / "new.json", slow=3.0)
    capsys.readouterr()
    assert compare.main([old, new, "--fail-slower", "5%"]) == 1
    assert "FAIL: vector_sum_twice/halves-n16000-fp32 is slower" in capsys.readouterr().out
    assert report.main([old, layers, "-o", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    for part in ("Vector sums: tables", "plot-vector_sum_vs_n", "A sum in two halves", "H1"):
        assert part in page
    assert verdict.main([old, layers]) == 0
    said = capsys.readouterr().out
    assert "S1  A sum in two halves is slower." in said
    assert "n = 16000 (fp32) vs plain: holds" in said
    readme = tmp_path / "README.md"
    readme.write_text("<!-- vector_sum:begin -->\n<!-- vector_sum:end -->\nthe end\n")
    assert summary.main([old, layers, "--readme", str(readme)]) == 0
    assert "| halves | 16000 | 0.240 |" in readme.read_text()
    assert readme.read_text().endswith("the end\n")
    assert "dense_single" not in readme.read_text()  # a family is given its own results alone


def test_its_verdict_follows_the_samples(tmp_path, moved_in):
    results = load(sums(tmp_path / "a.json", slow=0.5))
    (found,) = verdict.judged(results)
    assert {judgement.status for judgement in found.judgements} == {"fails"}


def test_a_family_that_is_not_registered_is_told_and_its_times_are_shown(tmp_path, mixed, capsys):
    results = load_all(mixed)
    (note,) = results.notes
    assert "sums.json has 12 cases of the family vector_sum, which these tools do not" in note
    page = report.page(results, verdict.judged(results))
    for part in ("vector_sum_twice/halves-n16000-fp32", "plot-forward_vs_N", "do not know"):
        assert part in page
    assert compare.main([mixed[0], sums(tmp_path / "new.json", slow=3.0)]) == 0
    assert "6 slower" in capsys.readouterr().out
    for tool in (plot, verdict, summary):
        extra = ["-o", str(tmp_path), "--only", "forward_vs_N"] if tool is plot else []
        assert tool.main([*mixed, *extra]) == 0
        assert "which these tools do not know" in capsys.readouterr().out
    assert (tmp_path / "forward_vs_N.png").exists()
