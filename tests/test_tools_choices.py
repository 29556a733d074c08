"""Auto stands beside the fastest of what was asked for by name, at the same layer and size."""

from tests import synthetic_results as synthetic
from tools.families.linear.choices import choices_table
from tools.results import load


def layer(seconds, **asked):
    return synthetic.entry("block_shock", 4096, 64, seconds=seconds, **asked)


def rows(tmp_path, entries):
    return choices_table(load(synthetic.write(tmp_path / "r.json", entries))).rows


NAMED = [
    layer(2e-3, kernel="thin", reduce="exchange"),
    layer(3e-3, kernel="cusparselt", reduce="collective"),
]


def test_auto_stands_beside_the_fastest_by_name(tmp_path):
    (row,) = rows(tmp_path, [layer(2.5e-3, kernel="auto", reduce="auto"), *NAMED])
    assert (row["N"], row["B"], row["named"]) == (4096, 64, "thin, exchange")
    assert abs(row["ratio"].value - 1.25) < 1e-6


def test_what_leaves_one_of_both_to_auto_is_neither(tmp_path):
    mixed = layer(1e-3, kernel="thin", reduce="auto")
    (row,) = rows(tmp_path, [layer(2.5e-3, kernel="auto", reduce="auto"), mixed, *NAMED])
    assert row["best"].median == 2e-3
    assert rows(tmp_path, [mixed, *NAMED]) == []


def test_another_mask_or_size_is_another_row_and_needs_its_own_auto(tmp_path):
    other = [layer(1e-3, kernel=k, reduce="exchange", mask="1100") for k in ("thin", "folded")]
    found = rows(tmp_path, [layer(2.5e-3, kernel="auto", reduce="auto"), *NAMED, *other])
    assert [row["named"] for row in found] == ["thin, exchange"]


def test_one_sum_by_name_is_no_choice_of_sums(tmp_path):
    one = [layer(1e-3, kernel=k, reduce="collective") for k in ("thin", "wide")]
    assert rows(tmp_path, [layer(2.5e-3, kernel="auto", reduce="auto"), *one]) == []
