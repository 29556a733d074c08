"""A family moves in with its own folders and a line in the registry, and nothing else."""

import json

import pytest

pytestmark = pytest.mark.slow  # each test is a run of its own


def test_a_family_that_moved_in_is_measured_and_recorded(moved_in):
    saved = json.loads(moved_in.results().read_text())["benchmarks"]
    assert [entry["extra_info"]["id"] for entry in saved] == [
        f"vector_sum_{phase}/{name}"
        for phase in ("forward", "twice")
        for name in (
            "plain-n1000-fp32", "halves-n1000-fp32", "plain-n1001-fp32",
            "plain-n1000-fp32-scale=large", "halves-n1000-fp32-scale=large",
        )
    ]  # fmt: skip
    info = saved[1]["extra_info"]
    assert info["case"]["family"] == "vector_sum"
    assert info["timing"]["interleaved_with"] == ["plain"]
    assert info["rates"]["entries_per_s"] > 0
    assert info["memory"]["input_bytes"] == 8000
    assert saved[0]["name"] == "bench_forward[plain-n1000-fp32]"


def test_its_sweeps_refusals_fields_and_phases_are_those_of_every_family(moved_in):
    (_, listed), (_, wrong), (before, _), (after, _) = moved_in.run(
        ["pytest", "bench", "--collect-only", "-q", "--set", "n=64"],
        ["pytest", "bench/bench_vector_sum.py", "--set", "scale=huge"],
        ["blockshock.phases.schema", "--check"],
        ["blockshock.phases.schema"],
    )
    assert "bench_vector_sum.py::bench_twice[halves-n64-fp32]" in listed
    assert "bench_linear.py::" not in listed
    assert "unknown scale 'huge'; use one of one, large" in wrong
    assert (before, after) == (1, 0)
    text = (moved_in.root / "tools/SCHEMA.md").read_text()
    assert "| `scale` | size of the entries | `one`, `large` | `one` |" in text
    assert "| `twice` | The sum of a sum |" in text


def test_what_was_measured_goes_through_every_tool(moved_in):
    file = moved_in.results()
    (moved_in.root / "PAGE.md").write_text("<!-- vector_sum:begin -->\n<!-- vector_sum:end -->\n")
    ends = moved_in.run(
        ["tools.plot", file, "-o", "plots"],
        ["tools.verdict", file, "--out", "verdict"],
        ["tools.report", file, "-o", "report.html"],
        ["tools.summary", file, "--readme", "PAGE.md"],
        ["tools.compare", file, file],
    )
    assert all(code == 0 for code, _ in ends), ends
    assert (moved_in.root / "plots/vector_sum_vs_n.png").stat().st_size > 1000
    assert "S1" in (moved_in.root / "verdict/verdict.md").read_text()
    assert "Vector sums" in (moved_in.root / "report.html").read_text()
    assert "| halves |" in (moved_in.root / "PAGE.md").read_text()
    assert "0 slower" in ends[-1][1] or "10 same" in ends[-1][1]
