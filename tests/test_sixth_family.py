"""A family moves in with its own folders and a line in the registry, and nothing else."""

import json


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


def test_its_refusals_and_sweeps_are_those_of_every_family(moved_in):
    out = moved_in.run("pytest", "bench", "--collect-only", "-q", "--set", "n=64")
    assert "bench_vector_sum.py::bench_twice[halves-n64-fp32]" in out.stdout
    assert "bench_linear.py::" not in out.stdout
    wrong = moved_in.run("pytest", "bench/bench_vector_sum.py", "--set", "scale=huge")
    assert "unknown scale 'huge'; use one of one, large" in wrong.stderr


def test_its_fields_and_phases_are_written_into_schema(moved_in):
    assert moved_in.run("blockshock.phases.schema", "--check").returncode == 1
    assert moved_in.run("blockshock.phases.schema").returncode == 0
    text = (moved_in.root / "tools/SCHEMA.md").read_text()
    assert "| `scale` | size of the entries | `one`, `large` | `one` |" in text
    assert "| `twice` | The sum of a sum |" in text
