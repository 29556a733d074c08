"""Which families a run asks, by the paths that it is given, wherever it is started."""

from pathlib import Path

import pytest

from bench import asked

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("paths", "folder", "families"),
    [
        (["bench"], ".", ["linear", "attention"]),
        (["."], ".", ["linear", "attention"]),
        (["bench/bench_attention.py"], ".", ["attention"]),
        (["bench/bench_linear.py::bench_drift[x::y]", "tests"], ".", ["linear"]),
        (["bench_attention.py", "bench_linear.py"], "bench", ["linear", "attention"]),
        ([f"{ROOT}/bench"], "/", ["linear", "attention"]),
        (["tests"], ".", []),
        (["bench/bench_nothing.py"], ".", []),
        (["bench/sweeps"], ".", []),
    ],
)
def test_families_are_asked_whose_bench_files_are_among_the_paths(paths, folder, families):
    assert asked.families(paths, ROOT / folder) == families


def test_one_rank_is_meant_where_only_families_of_one_rank_are_asked():
    assert asked.ranks(["attention"]) == 1
    assert asked.ranks(["linear"]) == asked.ranks(["linear", "attention"]) == asked.ranks([]) == 2
