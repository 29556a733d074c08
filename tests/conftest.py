"""What tests of whole runs share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(pytester):
    """Runs `pytest bench` on two CPU ranks, inside this process, with small cases."""

    def run(*args, files=("bench",), cache=("-p", "no:cacheprovider")):
        paths = [ROOT / file for file in files]
        return pytester.runpytest_inprocess(
            "-c", ROOT / "pytest.ini", f"--rootdir={ROOT}", *cache,
            "--device=cpu", "--rounds=5", *args, *paths, no_reraise_ctrlc=True,
        )  # fmt: skip

    return run
