"""Comparing: a real change is found, noise is not, and a gate never passes by accident."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import synthetic_results as synthetic
from tools import compare, stats
from tools.files import ToolError
from tools.results import load

ID = "forward/block_shock-N4096-B64-bf16"


def write(tmp_path, name, data, *, method="block_shock", **options):
    """A file with one case and these samples."""
    entry = synthetic.entry(method, 4096, 64, data=data, **options.pop("case", {}))
    for key, value in options.pop("info", {}).items():
        entry["extra_info"][key] = value
    return synthetic.write(tmp_path / f"{name}.json", [entry], **options)


def verdict(tmp_path, before, after, **options):
    """The verdict on one case."""
    old, new = write(tmp_path, "old", before), write(tmp_path, "new", after)
    (row,) = compare.compare([load(old)], [load(new)], **options).rows
    return row.verdict


def noisy(scale=1.0, *, noise=0.005, rounds=30, seed=0):
    return synthetic.samples(1e-3 * scale, rounds=rounds, noise=noise, seed=seed)


@pytest.mark.parametrize(("scale", "word"), [(1.1, "slower"), (0.9, "faster"), (1.0, "same")])
def test_a_change_of_ten_percent_is_found_and_none_is_none(tmp_path, scale, word):
    assert verdict(tmp_path, noisy(), noisy(scale, seed=1)) == word


def test_a_change_within_the_threshold_is_no_change(tmp_path):
    assert verdict(tmp_path, noisy(noise=0.001), noisy(1.05, noise=0.001, seed=1)) == "same"
    assert verdict(tmp_path, noisy(noise=0.001), noisy(1.07, noise=0.001, seed=1)) == "slower"
    smaller = verdict(
        tmp_path, noisy(noise=0.001), noisy(1.01, noise=0.001, seed=1), threshold=0.005
    )
    assert smaller == "slower"


def test_a_change_that_noise_could_have_made_is_unsure(tmp_path):
    # 4% apart, and the rounds scatter by 30%.
    assert verdict(tmp_path, noisy(noise=0.3), noisy(1.04, noise=0.3, seed=1)) == "unsure"


def test_sameness_is_shown_not_assumed(tmp_path):
    assert verdict(tmp_path, noisy(noise=0.3), noisy(noise=0.3, seed=1)) == "unsure"


def test_fewer_than_six_samples_are_never_judged(tmp_path):
    assert verdict(tmp_path, noisy(rounds=5), noisy(2.0, rounds=5)) == "unsure"
    assert verdict(tmp_path, noisy(rounds=6), noisy(2.0, rounds=6)) == "slower"


@settings(max_examples=25, deadline=None)
@given(st.floats(0.2, 5), st.integers(0, 1000))
def test_swapping_old_and_new_inverts_the_ratio_and_the_verdict(scale, seed):
    a, b = noisy(seed=seed), noisy(scale, seed=seed + 1)
    there, back = stats.ratio(b, a), stats.ratio(a, b)
    assert there.value == pytest.approx(1 / back.value)
    assert there.low <= there.value <= there.high
    swapped = {"slower": "faster", "faster": "slower"}
    if abs(scale - 1) > 0.05:
        assert stats.judge(back) == swapped[stats.judge(there)]


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-6, 1e3), st.integers(0, 1000))
def test_the_unit_of_time_does_not_matter(factor, seed):
    a, b = noisy(seed=seed), noisy(1.2, seed=seed + 1)
    scaled = stats.ratio([factor * x for x in b], [factor * x for x in a])
    plain = stats.ratio(b, a)
    for one, other in ((scaled.low, plain.low), (scaled.high, plain.high)):
        assert one == pytest.approx(other, rel=1e-9)


def test_intervals_of_correlated_rounds_seldom_miss():
    """Equal AR(1) series, lag-1 correlation 0.5: the 95% interval leaves 1 out in about 5%."""
    chance = np.random.default_rng(0)

    def series():
        noise, values = chance.normal(size=80), np.zeros(80)
        for i in range(1, 80):
            values[i] = 0.5 * values[i - 1] + noise[i]
        return tuple(1 + 0.01 * values[50:])

    intervals = [stats.ratio(series(), series()) for _ in range(150)]
    missed = sum(interval.low > 1 or interval.high < 1 for interval in intervals)
    assert missed <= 18  # 12%: three standard deviations above 5%
    # A series resampled one by one would miss far more often; its interval is narrower.
    assert np.mean([interval.high - interval.low for interval in intervals]) > 0.018


def drifting(chance, runs, *, scale=1.0, between=0.02, within=0.005):
    """So many runs of 30 rounds of one case, each a little slower or faster as a whole."""
    return [
        tuple(1e-3 * scale * np.exp(chance.normal(0, between) + chance.normal(0, within, 30)))
        for _ in range(runs)
    ]


@pytest.mark.parametrize("runs", [2, 3])
def test_intervals_of_several_runs_seldom_miss_what_drifts_between_them(runs):
    """Equal sides whose runs drift by 2%: of 150 intervals about 5% miss 1, of rounds alone 87%."""
    chance = np.random.default_rng(0)
    pairs = [(drifting(chance, runs), drifting(chance, runs)) for _ in range(150)]

    def missed(intervals):
        return sum(interval.low > 1 or interval.high < 1 for interval in intervals)

    assert missed(stats.ratio_of_runs(new, old) for new, old in pairs) <= 15  # 5% + 3 deviations
    assert missed(stats.ratio(new[0], old[0]) for new, old in pairs) >= 100


def test_several_runs_find_a_change_that_exceeds_their_spread(tmp_path, capsys):
    chance = np.random.default_rng(0)
    sides = [
        [
            write(tmp_path, f"{name}{i}", list(run))
            for i, run in enumerate(drifting(chance, 4, scale=scale, between=0.005))
        ]
        for name, scale in (("old", 1.0), ("new", 1.05))
    ]
    assert compare.main([*sides[0], "--against", *sides[1], "--fail-slower", "3%"]) == 1
    printed = capsys.readouterr().out
    assert "1 slower, 0 faster" in printed  # 5%, which one run a side would call unsure or same
    assert "One run a side" not in printed
    compare.main([sides[0][0], sides[1][0]])
    printed = capsys.readouterr().out
    assert "0 slower, 0 faster" in printed
    assert "One run a side does not know how much two runs of the same code differ" in printed


def test_identical_runs_that_drift_are_seldom_called_slower_or_faster(tmp_path):
    """Two A/A runs one file a side: rounds narrow as on a GPU, runs 2% apart as measured."""
    chance = np.random.default_rng(1)
    words = []
    for _ in range(150):
        (old,), (new,) = drifting(chance, 1), drifting(chance, 1)
        words.append(stats.judge(stats.ratio(new, old), stats.ALONE))
    assert sum(word in ("slower", "faster") for word in words) <= 8


@pytest.mark.parametrize("rounds", [3, 30])
def test_a_file_against_itself_is_the_same_everywhere(tmp_path, capsys, rounds):
    path = write(tmp_path, "one", noisy(noise=0.5, rounds=rounds))
    assert compare.main([path, path, "--fail-slower", "0%"]) == 0
    assert "0 slower, 0 faster, 0 unsure, 1 same" in capsys.readouterr().out
    copy = write(tmp_path, "copy", noisy(noise=0.5, rounds=rounds))
    assert compare.main([path, "--against", copy, "--fail-slower", "0%"]) == 0


def test_a_case_that_some_files_lack_is_judged_by_the_others_and_told(tmp_path, capsys):
    both = [synthetic.entry(m, 4096, 64, data=noisy()) for m in ("block_shock", "dense_tp_row")]
    first = synthetic.write(tmp_path / "a.json", both)
    second = synthetic.write(tmp_path / "b.json", both[:1])
    new = write(tmp_path, "new", noisy(seed=2))
    assert compare.main([first, second, "--against", new, "--fail-slower", "5%"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL: forward/dense_tp_row-N4096-B64-bf16 is missing" in printed
    assert compare.main([first, second, "--against", first]) == 0
    assert "Not in every file: 1 cases (forward/dense_tp_row" in capsys.readouterr().out


@pytest.mark.parametrize("args", [["a"], ["a", "b", "c"], ["a", "a", "--against", "b"]])
def test_files_that_make_no_two_sides_are_refused(args, capsys):
    with pytest.raises(SystemExit) as ended:
        compare.main(args)
    assert ended.value.code == 2
    assert "--against" in (said := capsys.readouterr().err) or "twice" in said


def test_equal_samples_have_the_ratio_one_where_their_number_is_even():
    even = (1e-3, 2e-3, 4e-3, 9e-3)
    assert stats.ratio(even, even).value == 1.0


def test_a_longer_correlation_asks_for_longer_blocks():
    chance = random.Random(0)
    white = np.array([chance.gauss(0, 1) for _ in range(100)])
    assert stats.block_length(np.cumsum(white)) > stats.block_length(white)
    assert stats.block_length(np.ones(100)) == 1


def test_rounds_measured_together_cancel_what_slowed_both():
    chance = random.Random(0)
    wander = [1 + 0.2 * chance.random() for _ in range(30)]
    a = tuple(1e-3 * w * (1 + 1e-4 * chance.random()) for w in wander)
    b = tuple(1.1 * x for x in a)
    apart, together = stats.ratio(b, a), stats.ratio(b, a, paired=True)
    assert together.high - together.low < 0.1 * (apart.high - apart.low)


@pytest.mark.parametrize(
    ("scale", "limit", "code"),
    [(1.1, "5%", 1), (1.1, "12.5%", 0), (1.03, "5", 0), (1.03, "2.5", 1)],
)
def test_the_gate_fails_beyond_its_limit_and_takes_fractions(tmp_path, capsys, scale, limit, code):
    old, new = write(tmp_path, "old", noisy()), write(tmp_path, "new", noisy(scale, seed=1))
    assert compare.main([old, new, "--fail-slower", limit]) == code
    assert ("FAIL: " in capsys.readouterr().out) == bool(code)


def test_without_the_gate_a_slower_case_is_no_failure(tmp_path):
    old, new = write(tmp_path, "old", noisy()), write(tmp_path, "new", noisy(2.0))
    assert compare.main([old, new]) == 0


def test_a_missing_case_fails_the_gate_with_its_own_message(tmp_path, capsys):
    old = write(tmp_path, "old", noisy())
    new = write(tmp_path, "new", noisy(), method="dense_tp_row")
    assert compare.main([old, new, "--fail-slower", "5%"]) == 1
    printed = capsys.readouterr().out
    assert f"FAIL: {ID} is missing from the new results" in printed
    assert "only in new" in printed
    assert "Nothing was compared: no case is on both sides." in printed
    assert compare.main([old, new]) == 0


def test_a_case_with_too_few_samples_fails_the_gate(tmp_path, capsys):
    old = write(tmp_path, "old", noisy(rounds=3))
    new = write(tmp_path, "new", noisy(rounds=3, seed=1))
    assert compare.main([old, new, "--fail-slower", "5%"]) == 1
    assert "could not be judged: 3 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"info": {"timing": {"mode": "events", "l2": "warm"}}}, "timing mode: graph → events"),
        ({"case": {"input": "uniform"}}, "input: gaussian → uniform"),
    ],
)
def test_what_was_measured_in_another_way_is_not_judged(tmp_path, capsys, changes, note):
    old, new = write(tmp_path, "old", noisy()), write(tmp_path, "new", noisy(2.0), **changes)
    assert compare.main([old, new, "--fail-slower", "5%"]) == 1
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"device": "4x NVIDIA H200"}, {"kind": "cpu"}])
def test_different_devices_are_refused_unless_told(tmp_path, capsys, options):
    old, new = write(tmp_path, "old", noisy()), write(tmp_path, "new", noisy(), **options)
    with pytest.raises(ToolError, match="--across-devices"):
        compare.main([old, new])
    assert compare.main([old, new, "--across-devices"]) == 0
    assert "Differs: device" in capsys.readouterr().out


def test_markdown_csv_and_terminal_hold_every_case(tmp_path, capsys):
    entries = synthetic.everything((256,), (16,))
    old = synthetic.write(tmp_path / "old.json", entries[2:])
    new = synthetic.write(tmp_path / "new.json", entries[:-2])
    markdown, csv = tmp_path / "out" / "a.md", tmp_path / "out" / "a.csv"
    compare.main([old, new, "--markdown", str(markdown), "--csv", str(csv)])
    printed = capsys.readouterr().out
    for entry in entries:
        for text in (printed, markdown.read_text(), csv.read_text()):
            assert entry["extra_info"]["id"] in text
    assert csv.read_text().splitlines()[0].startswith("id,old,new,ratio,ratio_low,ratio_high")


@pytest.mark.parametrize("text", ["fast", "-1%", "nan", "inf"])
def test_a_wrong_percentage_ends_with_code_2(text, capsys):
    with pytest.raises(SystemExit) as ended:
        compare.main(["a", "b", f"--fail-slower={text}"])
    assert ended.value.code == 2
    assert "is not a percentage" in capsys.readouterr().err
