"""Which families a run asks, by the paths that it is given, wherever it is started."""

from pathlib import Path

import pytest

from bench import asked
from blockshock.phases.families import FAMILIES

ROOT = Path(__file__).parents[1]
EVERY = list(FAMILIES)


@pytest.mark.parametrize(
    ("paths", "folder", "families"),
    [
        (["bench"], ".", EVERY),
        (["."], ".", EVERY),
        (["bench/bench_attention.py"], ".", ["attention"]),
        (["bench/bench_linear.py::bench_drift[x::y]", "tests"], ".", ["linear"]),
        (["bench_attention.py", "bench_linear.py"], "bench", ["linear", "attention"]),
        ([f"{ROOT}/bench"], "/", EVERY),
        (["bench/bench_lm.py"], ".", ["data_parallel"]),
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


@pytest.mark.parametrize(
    ("file", "function", "told"),
    [
        ("bench_convolution", "bench_forward", "there is no family 'convolution'; known: linear, "),
        ("bench_attention", "bench_foward", "there is no phase 'foward'; known: forward, "),
    ],
)
def test_a_bench_that_asks_nothing_is_one_clear_error(pytester, file, function, told):
    pytester.makepyfile(**{file: f"def {function}(record): pass"})
    path = pytester.path / f"{file}.py"
    out = pytester.runpytest_inprocess(
        "-c", ROOT / "pytest.ini", f"--rootdir={ROOT}", f"--confcutdir={ROOT}", "-p", "conftest",
        "-p", "no:cacheprovider", "--device=cpu", path,
    )  # fmt: skip
    assert out.ret != 0
    assert told in out.stdout.str() + out.stderr.str()
