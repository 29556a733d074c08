"""The verdict: what holds, fails, is mixed or undecided on results made to be so."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import synthetic_attention
from tests import synthetic_results as synthetic
from tools import verdict
from tools.families.linear.rules import Point, agreed, corners, large_enough, reached
from tools.judged import FAILS, HOLDS, STATUSES, Judgement, sentence
from tools.results import load, load_all
from tools.stats import Interval

GRID = [(n, b) for n in (4096, 8192, 16384) for b in (64, 1024, 4096)]
NCCL = "dense TP (NCCL)"


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
    return {found.name: found for found in verdict.judged(load(path))}


def h1(tmp_path, entries):
    """The only judgement that decides H1."""
    (one,) = judged(tmp_path, entries)["H1"].deciding
    return one


def test_h1_holds_where_a_corner_of_large_sizes_is_faster(tmp_path):
    found = h1(tmp_path, forward(lambda n, b: 0.9 if n >= 8192 and b >= 1024 else 1.3))
    assert (found.title, found.status) == (f"tile vs {NCCL}", "holds")
    assert found.words == (
        "faster at 4 of 4 points with N ≥ 8192 and B ≥ 1024, time ratio 0.900 to 0.900; "
        "elsewhere faster at none of 5 points"
    )


def test_h1_fails_where_the_largest_sizes_are_not_faster(tmp_path):
    found = h1(tmp_path, forward(lambda n, b: 0.9 if n == 4096 else 1.2))
    assert found.status == "fails"
    assert "faster at none of 6 points with N ≥ 8192, " in found.words
    assert found.words.endswith("elsewhere faster at 3 of 3 points")


def test_a_point_that_is_unsure_is_named_and_decides_nothing(tmp_path):
    entries = forward(lambda n, b: 0.8)
    for entry in entries:
        case, stats = entry["extra_info"]["case"], entry["stats"]
        if (case["N"], case["B"], case["method"]) == (16384, 4096, "block_shock"):
            stats["data"] = stats["data"][:5]
    found = h1(tmp_path, entries)
    assert found.status == "holds"
    assert "faster at 8 of 9 points, " in found.words
    assert "unsure at N=16384 B=4096" in found.words


@pytest.mark.parametrize("axis", ["N", "B"])
def test_h1_does_not_hold_where_nothing_is_sure_at_the_largest_size(tmp_path, axis):
    entries = forward(lambda n, b: 0.8)
    largest = max(entry["extra_info"]["case"][axis] for entry in entries)
    for entry in entries:
        case, stats = entry["extra_info"]["case"], entry["stats"]
        if case["method"] == "block_shock" and case[axis] == largest:
            stats["data"] = stats["data"][:5]  # too few for an interval
    found = h1(tmp_path, entries)
    assert found.status == "undecided"
    assert "faster at 6 of 9 points, " in found.words


@pytest.mark.parametrize(
    ("speeds", "grid", "status"),
    [
        (lambda n, b: 0.9 if (n, b) == (16384, 4096) else 1.2, GRID, "mixed"),
        (lambda n, b: 0.9, GRID[:1], "undecided"),  # one point is no trend
        # each end says its own
        (lambda n, b: 0.9 if n < b else 1.2, [(64, 4096), (4096, 64)], "mixed"),
    ],
)
def test_h1_neither_holds_nor_fails_without_a_trend(tmp_path, speeds, grid, status):
    assert h1(tmp_path, forward(speeds, grid=grid)).status == status


def test_h1_is_against_the_better_dense_method(tmp_path):
    # Faster than dense_tp_column (1.3 ms) everywhere, slower than dense_tp_row (1 ms).
    found = h1(tmp_path, forward(lambda n, b: 1.1))
    assert found.status == "fails"
    assert {point.against for point in found.points} == {"dense_tp_row"}


def test_h1_takes_no_win_over_one_dense_method_alone(tmp_path):
    alone = h1(tmp_path, forward(lambda n, b: 0.8, methods=("dense_tp_column",)))
    assert alone.status == "undecided"
    assert {point.note for point in alone.points} == {"only dense_tp_column was measured"}
    lost = forward(lambda n, b: 1.5, methods=("dense_tp_column",))
    assert h1(tmp_path, lost).status == "fails"


def test_h1_is_judged_for_each_dtype(tmp_path):
    entries = forward(lambda n, b: 0.8) + forward(lambda n, b: 1.2, dtype="fp16")
    found = judged(tmp_path, entries)["H1"]
    assert {one.line: one.status for one in found.deciding} == {
        "tile, bf16": "holds",
        "tile, fp16": "fails",
    }
    assert found.sentence == f"Holds for tile, bf16, fails for tile, fp16 against {NCCL}."


def test_h1_is_decided_by_2_4_kernels_and_folded_stands_beside(tmp_path):
    entries = forward(lambda n, b: 1.2)
    entries += [synthetic.entry("block_shock_folded", n, b, seconds=0.5e-3) for n, b in GRID]
    found = judged(tmp_path, entries)["H1"]
    assert [one.status for one in found.deciding] == ["fails"]
    (folded,) = found.beside
    assert (folded.line, folded.status) == ("block_shock_folded", "holds")
    assert "holds" not in found.sentence.lower()


def points_of(verdicts):
    one = Interval(1.0, 1.0, 1.0, 30)
    return [Point(n, b, "", "", one, word) for (n, b), word in verdicts.items()]


@given(
    st.dictionaries(
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
        st.sampled_from(["faster", "slower", "same", "unsure"]),
        min_size=1,
    )
)
def test_what_holds_is_faster_at_most_points_of_a_corner_and_slower_at_none(verdicts):
    points = points_of(verdicts)
    status, words = large_enough(points, "faster")
    assert status in STATUSES
    assert "faster at" in words
    found = [[p.verdict for p in inside] for inside in corners(points)]
    won = [
        v
        for v, inside in zip(found, corners(points), strict=True)
        if v.count("faster") > len(v) / 2 and not {"slower", "same"} & set(v) and reached(inside)
    ]
    lost = [
        v for v in found if v.count("slower") + v.count("same") > len(v) / 2 and "faster" not in v
    ]
    assert (status == HOLDS) == (bool(won) and not lost)
    assert (status == FAILS) == (bool(lost) and not won)


@given(st.sets(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1))
def test_a_corner_holds_every_larger_size_and_the_largest(places):
    points = points_of(dict.fromkeys(places, "same"))
    found = [{(p.N, p.B) for p in inside} for inside in corners(points)]
    assert [len(inside) for inside in found] == sorted(map(len, found), reverse=True)
    for inside in found:
        least = [min(size) for size in zip(*inside, strict=True)]
        assert inside == {(n, b) for n, b in places if n >= least[0] and b >= least[1]}
        most = [max(size) for size in zip(*places, strict=True)]
        assert [max(size) for size in zip(*inside, strict=True)] == most


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        (["faster"] * 3, "holds"),
        (["slower", "same", "slower"], "fails"),
        (["faster", "slower"], "mixed"),
        (["faster", "faster", "unsure"], "holds"),
        (["faster", "unsure"], "undecided"),
        (["faster", "same", "unsure", "unsure"], "mixed"),
        (["unsure"], "undecided"),
    ],
)
def test_points_agree_where_most_say_so_and_none_the_contrary(verdicts, status):
    assert agreed(points_of(dict(zip(GRID, verdicts, strict=False))), "faster") == status


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
    (one,) = found.deciding
    assert {point.verdict for point in one.points} == {word}
    assert one.status == status


def test_h2_judges_the_policies_of_a_mask_together(tmp_path):
    entries = training(0.4, 1.5) + [
        entry
        for entry in training(0.01, 0.8, policy="packed_master")
        if entry["extra_info"]["case"]["policy"] == "packed_master"
    ]
    (one,) = judged(tmp_path, entries)["H2"].deciding
    assert len(one.points) == 8
    assert one.status == "holds"
    assert one.words.startswith("shrinks at 4 of 4 points with an advantage")
    assert "0.800 in the forward, 1.500 in training" in one.words


def test_h2_is_undecided_where_upkeep_was_not_measured(tmp_path):
    entries = training(0.4, 1.5)
    for entry in entries:
        entry["extra_info"]["regions"] = {}
    (one,) = judged(tmp_path, entries)["H2"].deciding
    assert one.status == "undecided"
    assert "4 of 4 points are unsure" in one.words


def test_h2_is_undecided_where_more_points_are_unsure_than_test_it(tmp_path):
    entries = training(0.4, 1.5)
    for entry in entries:
        case = entry["extra_info"]["case"]
        if case["phase"] == "training" and (case["N"], case["B"]) != GRID[0]:
            entry["extra_info"]["regions"] = {}
    (one,) = judged(tmp_path, entries)["H2"].deciding
    assert one.status == "undecided"
    assert one.words.startswith("shrinks at 1 of 1 point with an advantage")
    assert "but 3 of 4 points are unsure" in one.words


@pytest.mark.parametrize(
    ("masked", "status"),
    [
        (lambda n: 1.5, "holds"),
        (lambda n: 0.7, "fails"),
        (lambda n: 1.5 if n > 4096 else 0.7, "mixed"),
    ],
)
def test_h3_compares_masked_split_with_block_shock(tmp_path, masked, status):
    entries = forward(lambda n, b: 1.0)
    entries += [synthetic.entry("masked_split", n, b, seconds=1e-3 * masked(n)) for n, b in GRID]
    (one,) = judged(tmp_path, entries)["H3"].deciding
    assert (one.title, one.status) == ("tile vs block_shock", status)
    assert one.words.endswith("; faster at N=4096") == (status == "mixed")
    assert one.words.endswith("; faster at all") == (status == "fails")


def test_nothing_measured_says_what_is_needed(tmp_path):
    for found in judged(tmp_path, [synthetic.entry("dense_single", 64, 1)]).values():
        assert found.judgements == ()
        assert found.sentence.startswith("Not measured: it needs ")


def test_four_ranks_stand_beside_hypotheses_about_two(tmp_path):
    found = judged(tmp_path, forward(lambda n, b: 0.5, ranks=4))["H1"]
    assert found.sentence.startswith("Not measured")
    assert [(one.decides, one.status) for one in found.judgements] == [(False, "holds")]


def test_too_few_samples_decide_nothing(tmp_path):
    entries = forward(lambda n, b: 0.5)
    for entry in entries:
        entry["stats"]["data"] = entry["stats"]["data"][:5]
    assert h1(tmp_path, entries).status == "undecided"


def test_a_sentence_has_the_status_of_every_line_against_every_opponent():
    def one(line, opponent, status, decides=True):
        return Judgement(line, opponent, status, "", (), decides)

    found = [one("a", "x", "fails"), one("b", "x", "holds"), one("c", "x", "fails")]
    found += [one("d", "x", "fails"), one("a", "y", "mixed"), one("e", "y", "holds", False)]
    said = "Holds for b, fails for a, c and d against x; mixed for a against y."
    assert sentence(found, "a run") == said
    assert sentence(found[-1:], "a run") == "Not measured: it needs a run."


def test_a_cpu_verdict_always_says_that_it_says_nothing_about_gpus(tmp_path, capsys):
    entries = forward(lambda n, b: 0.5)
    path = synthetic.write(tmp_path / "cpu.json", entries, kind="cpu")
    out = tmp_path / "out"
    assert verdict.main([path, "--out", str(out)]) == 0
    caveat = "CPU: says nothing about GPUs"
    printed = capsys.readouterr().out
    assert caveat in printed
    assert "those of this CPU run" in printed
    assert "tile vs dense TP (gloo): holds" in printed
    assert "NCCL" not in printed
    assert caveat in (out / "verdict.md").read_text()
    assert json.loads((out / "verdict.json").read_text())["caveat"] == caveat


@pytest.fixture
def variants(tmp_path):
    entries = synthetic.everything((256, 512), (16, 64), variants=synthetic.VARIANTS)
    return synthetic.write(tmp_path / "a.json", entries)


def test_the_verdict_is_short_and_all_has_every_point(variants, tmp_path, capsys):
    expected = verdict.judged(load(variants))
    judgements = [one for found in expected for one in found.judgements]
    deciding = [one for found in expected for one in found.deciding]
    assert 0 < len(deciding) < len(judgements)
    for every, shown in ((False, deciding), (True, judgements)):
        assert verdict.main([variants, "--out", str(tmp_path)] + ["--all"] * every) == 0
        page, printed = (tmp_path / "verdict.md").read_text(), capsys.readouterr().out
        assert (len(page.splitlines()) < 60) == (not every)
        for one in judgements:
            told = f"{one.title}: {one.status}, {one.words}"
            assert (told in page, told in printed) == (one in shown, one in shown)
        rows = [line for line in page.splitlines() if re.search(r"^\| .*\d \[\d", line)]
        assert len(rows) == sum(len(one.points) for one in judgements if every)
        assert ("more lines, with --all" in printed) == (not every)


def test_json_holds_every_point_in_one_line(variants, tmp_path):
    verdict.main([variants, "--out", str(tmp_path)])
    text = (tmp_path / "verdict.json").read_text()
    assert text.count("\n") == 1
    data = json.loads(text)["hypotheses"]
    expected = verdict.judged(load_all([variants]))
    assert [h["sentence"] for h in data] == [found.sentence for found in expected]
    points = [p for h in data for one in h["judgements"] for p in one["points"]]
    found = [p for h in expected for one in h.judgements for p in one.points]
    assert len(points) == len(found) > 20
    for point, one in zip(points, found, strict=True):
        assert point["ratio"]["value"] == pytest.approx(one.ratio.value, rel=1e-5)
        assert point["ratio"]["low"] <= point["ratio"]["value"] <= point["ratio"]["high"]


def test_a_family_without_a_hypothesis_has_no_verdict(tmp_path, capsys):
    path = synthetic_attention.read_write(tmp_path / "a.json", synthetic_attention.patterns())
    assert verdict.main([path, "--out", str(tmp_path)]) == 0
    assert verdict.NOTHING in capsys.readouterr().out
    assert json.loads((tmp_path / "verdict.json").read_text())["hypotheses"] == []
