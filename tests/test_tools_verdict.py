"""The verdict: what holds, fails or is undecided on results made to be so."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import synthetic_results as synthetic
from tools import verdict
from tools.families.linear.hypotheses import judge_all
from tools.families.linear.rules import corner
from tools.results import load, load_all

GRID = [(n, b) for n in (4096, 8192, 16384) for b in (64, 1024, 4096)]


def forward(speeds, *, methods=("dense_tp_row", "dense_tp_column"), grid=GRID, **changes):
    """block_shock's time is `speeds(n, b)` ms where the faster dense TP takes 1 ms."""
    entries = []
    for n, b in grid:
        times = {
            "dense_tp_row": 1e-3,
            "dense_tp_column": 1.3e-3,
            "block_shock": 1e-3 * speeds(n, b),
        }
        entries += [
            synthetic.entry(method, n, b, seconds=times[method], **changes)
            for method in (*methods, "block_shock")
        ]
    return entries


def judged(tmp_path, entries, **options):
    path = synthetic.write(tmp_path / "a.json", entries, **options)
    return {found.name: found for found in judge_all(load(path))}


def test_h1_holds_where_a_corner_of_large_sizes_is_faster(tmp_path):
    found = judged(tmp_path, forward(lambda n, b: 0.9 if n >= 8192 and b >= 1024 else 1.3))["H1"]
    assert found.status == "holds"
    assert "faster at each of the 4 points with N ≥ 8192 and B ≥ 1024" in found.headline


def test_h1_fails_where_the_largest_sizes_are_not_faster(tmp_path):
    found = judged(tmp_path, forward(lambda n, b: 0.9 if n == 4096 else 1.2))["H1"]
    assert found.status == "fails"
    assert "faster at none of the 6 points with N ≥ 8192 and B ≥ 64" in found.headline


@pytest.mark.parametrize(
    ("speeds", "grid"),
    [
        (lambda n, b: 0.9 if (n, b) == (16384, 4096) else 1.2, GRID),  # one point is no trend
        (lambda n, b: 0.9, GRID[:1]),
        (lambda n, b: 0.9 if n < b else 1.2, [(64, 4096), (4096, 64)]),  # each end says its own
    ],
)
def test_h1_is_undecided_without_a_trend(tmp_path, speeds, grid):
    assert judged(tmp_path, forward(speeds, grid=grid))["H1"].status == "undecided"


def test_h1_is_against_the_better_dense_method(tmp_path):
    # Faster than dense_tp_column (1.3 ms) everywhere, slower than dense_tp_row (1 ms).
    (finding,) = judged(tmp_path, forward(lambda n, b: 1.1))["H1"].findings
    assert finding.status == "fails"
    assert {point.against for point in finding.points} == {"dense_tp_row"}


def test_h1_takes_no_win_over_one_dense_method_alone(tmp_path):
    alone = forward(lambda n, b: 0.8, methods=("dense_tp_column",))
    assert judged(tmp_path, alone)["H1"].status == "undecided"
    lost = forward(lambda n, b: 1.5, methods=("dense_tp_column",))
    assert judged(tmp_path, lost)["H1"].status == "fails"


def test_h1_is_judged_for_each_dtype_and_undecided_where_they_differ(tmp_path):
    entries = forward(lambda n, b: 0.8) + forward(lambda n, b: 1.2, dtype="fp16")
    found = judged(tmp_path, entries)["H1"]
    assert {finding.setting: finding.status for finding in found.findings} == {
        "bf16": "holds",
        "fp16": "fails",
    }
    assert found.status == "undecided"


def test_h1_is_decided_by_2_4_kernels_and_folded_stands_beside(tmp_path):
    entries = forward(lambda n, b: 1.2)
    entries += [synthetic.entry("block_shock_folded", n, b, seconds=0.5e-3) for n, b in GRID]
    found = judged(tmp_path, entries)["H1"]
    assert found.status == "fails"
    folded = next(f for f in found.findings if f.method == "block_shock_folded")
    assert (folded.status, folded.main) == ("holds", False)


@given(st.dictionaries(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.sampled_from("wlu")))
def test_no_grid_both_holds_and_fails(verdicts):
    won, lost = corner(verdicts, {"w"}), corner(verdicts, {"l"})
    assert not (won and lost)
    for inside, word in ((won, "w"), (lost, "l")):
        assert all(verdicts[point] == word for point in inside)
        if inside:
            n0, b0 = (min(size) for size in zip(*inside, strict=True))
            assert inside == {(n, b) for n, b in verdicts if n >= n0 and b >= b0}


def training(upkeep, step, *, ahead=0.8, policy="dense_master", grid=GRID[:4]):
    """block_shock's step takes `step` ms where dense takes 1, `upkeep` of it for compress; its
    forward `ahead` ms where dense takes 1."""
    entries = []
    for n, b in grid:
        for method in ("dense_tp_row", "dense_tp_column", "block_shock"):
            main = method == "block_shock"
            seconds = 1e-3 * step if main else 1e-3
            region = {"avg": seconds, "p50": seconds, "p95": seconds, "calls": 1, "bytes": 0}
            regions = {"total": region}
            if main:
                regions["compress"] = {**region, "avg": upkeep * seconds}
            entries += [
                synthetic.entry(method, n, b, seconds=1e-3 * ahead if main else 1e-3),
                synthetic.entry(
                    method,
                    n,
                    b,
                    phase="training",
                    policy=policy if main else "plain",
                    optimizer="sgd",
                    seconds=seconds,
                    part={"regions": regions},
                ),
            ]
    return entries


@pytest.mark.parametrize(
    ("upkeep", "step", "ahead", "status", "word"),
    [
        (0.4, 1.5, 0.8, "holds", "shrinks"),
        (0.4, 0.8, 0.8, "fails", "kept"),
        (0.01, 0.8, 0.8, "undecided", "kept (small upkeep)"),
        (0.01, 1.2, 0.8, "undecided", "shrinks (small upkeep)"),
        (0.4, 2.5, 1.2, "undecided", "falls behind"),
        (0.4, 1.1, 1.2, "undecided", "none to lose"),
    ],
)
def test_h2_is_tested_only_where_there_is_an_advantage_and_upkeep(
    tmp_path, upkeep, step, ahead, status, word
):
    found = judged(tmp_path, training(upkeep, step, ahead=ahead))["H2"]
    (finding,) = found.findings
    assert {point.verdict for point in finding.points} == {word}
    assert found.status == status


def test_h2_judges_policies_together(tmp_path):
    entries = training(0.4, 1.5) + [
        entry
        for entry in training(0.01, 0.8, policy="packed_master")
        if entry["extra_info"]["case"]["policy"] == "packed_master"
    ]
    found = judged(tmp_path, entries)["H2"]
    assert [finding.status for finding in found.findings] == ["holds", "undecided"]
    assert found.status == "holds"


def test_h2_is_undecided_where_upkeep_was_not_measured(tmp_path):
    entries = training(0.4, 1.5)
    for entry in entries:
        entry["extra_info"]["regions"] = {}
    assert judged(tmp_path, entries)["H2"].status == "undecided"


@pytest.mark.parametrize(
    ("masked", "status"),
    [
        (lambda n: 1.5, "holds"),
        (lambda n: 0.7, "fails"),
        (lambda n: 1.5 if n > 4096 else 0.7, "undecided"),
    ],
)
def test_h3_compares_masked_split_with_block_shock(tmp_path, masked, status):
    entries = forward(lambda n, b: 1.0)
    entries += [synthetic.entry("masked_split", n, b, seconds=1e-3 * masked(n)) for n, b in GRID]
    assert judged(tmp_path, entries)["H3"].status == status


def test_nothing_measured_is_undecided_and_says_what_is_needed(tmp_path):
    for found in judged(tmp_path, [synthetic.entry("dense_single", 64, 1)]).values():
        assert found.status == "undecided"
        assert "it needs" in found.headline


def test_too_few_samples_decide_nothing(tmp_path):
    entries = forward(lambda n, b: 0.5)
    for entry in entries:
        entry["stats"]["data"] = entry["stats"]["data"][:5]
    assert judged(tmp_path, entries)["H1"].status == "undecided"


def test_a_cpu_verdict_always_says_that_it_says_nothing_about_gpus(tmp_path, capsys):
    entries = forward(lambda n, b: 0.5)
    path = synthetic.write(tmp_path / "cpu.json", entries, kind="cpu")
    out = tmp_path / "out"
    assert verdict.main([path, "--out", str(out), "--json", str(tmp_path / "v.json")]) == 0
    caveat = "CPU: says nothing about GPUs"
    printed = capsys.readouterr().out
    assert caveat in printed
    assert "HOLDS on this CPU" in printed
    assert caveat in (out / "verdict.md").read_text()
    assert json.loads((tmp_path / "v.json").read_text())["caveat"] == caveat


def test_json_and_markdown_hold_every_point(tmp_path, capsys):
    path = synthetic.write(tmp_path / "a.json", synthetic.everything((256, 512), (16, 64)))
    verdict.main([path, "--out", str(tmp_path)])
    data = json.loads((tmp_path / "verdict.json").read_text())
    points = [p for h in data["hypotheses"] for f in h["findings"] for p in f["points"]]
    expected = [p for h in judge_all(load_all([path])) for f in h.findings for p in f.points]
    assert len(points) == len(expected) > 20
    assert all(p["ratio"]["low"] <= p["ratio"]["value"] <= p["ratio"]["high"] for p in points)
    table_rows = (tmp_path / "verdict.md").read_text().count("\n| 256 |")
    assert table_rows == sum(point.N == 256 for point in expected)
    assert "CPU" not in capsys.readouterr().out
