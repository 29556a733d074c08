"""What tests of whole runs share, and a made-up family; see tests/sixth_family/README.md."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blockshock.distributed import open_ranks

ROOT = Path(__file__).parents[1]
collect_ignore = ["sixth_family"]
# Its line in each registry that there is.
REGISTRIES = {
    "blockshock/phases/families.py": (
        "\nfrom blockshock.phases.vector_sum import FAMILY as vector_sum\n"
        'FAMILIES["vector_sum"] = vector_sum\n'
    ),
    "tools/families/__init__.py": (
        "\nfrom tools.families.vector_sum import FAMILY as vector_sum\n"
        'FAMILIES["vector_sum"] = vector_sum\n'
    ),
}

# python -m for each command, in one process: an interpreter that imports torch starts in seconds.
EACH = """
import contextlib, io, json, runpy, sys

ends = []
for sys.argv in json.loads(sys.stdin.read()):
    said, code = io.TextIOWrapper(io.BytesIO(), write_through=True), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_module(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    ends.append((code, said.buffer.getvalue().decode()))
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def one_thread():
    """Faster where products are small, above all beside other work; sums have the same order as in
    processes that are started with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def moved_in(tmp_path_factory):
    """A checkout with a sixth family: `.root`, `.run(*commands)`, and `.results()`.

    run: python -m there, for each command, a list: (exit code, what it printed). results: a JSON
    file of its quick sweep, measured on two CPU ranks at the first call.
    """
    root = tmp_path_factory.mktemp("sixth") / "checkout"
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in ("blockshock", "bench", "tools", "tests/sixth_family"):
        goal = root if folder.endswith("sixth_family") else root / folder
        shutil.copytree(ROOT / folder, goal, ignore=skipped, dirs_exist_ok=True)
    for name in ("conftest.py", "pytest.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    for name, line in REGISTRIES.items():
        with (root / name).open("a") as registry:
            registry.write(line)

    def run(*commands):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "RANK"))}
        done = subprocess.run(
            [sys.executable, "-c", EACH],
            input=json.dumps([[str(word) for word in command] for command in commands]),
            cwd=root,
            env={**inherited, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def results():
        file = root / "sixth.json"
        if not file.exists():
            ((code, said),) = run([
                "pytest", "bench/bench_vector_sum.py", "--device=cpu", "--ranks=2", "--rounds=12",
                "--results", file,
            ])  # fmt: skip
            assert code == 0, said
        return file

    return SimpleNamespace(root=root, run=run, results=results)


@pytest.fixture(scope="session")
def cpu_ranks(ranks):
    """Two CPU ranks: the session's, or others beside them."""
    if (ranks.device, ranks.size) == ("cpu", 2):
        yield ranks
    else:
        with open_ranks(2, "cpu") as pool:
            yield pool


@pytest.fixture(scope="session")
def four():
    """Four CPU ranks beside the session's."""
    with open_ranks(4, "cpu") as pool:
        yield pool


@pytest.fixture
def shared_ranks(cpu_ranks, monkeypatch):
    """Runs inside a test use the same ranks, as it takes seconds to start them."""
    monkeypatch.setattr("conftest.open_ranks", lambda size, device, **_: nullcontext(cpu_ranks))


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
