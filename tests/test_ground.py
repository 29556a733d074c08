"""Pins and dependencies agree, and make does what it says."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import blockshock

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def requirements():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def test_every_dependency_is_pinned_to_a_version_that_it_allows():
    pins = constraints()
    for wanted in requirements():
        name = canonicalize_name(wanted.name)
        if name == "triton":
            assert name not in pins, "the CUDA build of torch pins its own triton"
            continue
        (pin,) = pins[name].specifier
        assert pin.operator == "=="
        assert wanted.specifier.contains(pin.version), f"{wanted} against {pins[name]}"


def test_constraints_name_no_place_to_fetch_from():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|^-|@", text, re.MULTILINE)


def test_the_version_is_read_without_importing_the_package():
    tree = ast.parse((ROOT / "blockshock/version.py").read_text())
    values = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    ]
    assert values == [blockshock.__version__]


def test_no_source_has_a_fixed_port():
    fixed = re.compile(r"(\btcp://[\w.]+|\b127\.0\.0\.1|\blocalhost):\d|MASTER_PORT\W{1,6}\d")
    sources = [
        p for d in ("blockshock", "bench", "tools", "tests") for p in (ROOT / d).rglob("*.py")
    ]
    found = [p for p in sources if p != Path(__file__) and fixed.search(p.read_text())]
    assert not found


def test_hooks_fetch_nothing():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose environment stands already; the shell script `program` is its python."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)

    def make(*arguments, program="exit 0", installed=True, **environ):
        python.write_text(f'#!/bin/sh\necho "run: $*"\n{program}\n')
        python.chmod(0o755)
        if installed:
            (tmp_path / ".venv/installed").touch()
        inherited = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        return subprocess.run(
            ["make", *arguments],
            cwd=tmp_path,
            env=inherited | environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    make.root = tmp_path
    make.python = python
    return make


# Measures: writes what --results names; fails like pytest does when a case fails.
MEASURES = """
while [ $# -gt 0 ]; do
    if [ "$1" = --results ]; then echo '{}' > "$2"; status=%d; fi
    shift
done
exit ${status:-0}
"""


def test_make_test_is_pytest_tests(checkout):
    done = checkout("test", "PYTEST_ARGS=-k forward")
    assert done.returncode == 0, done.stderr
    assert "run: -m pytest tests -k forward" in done.stdout


@pytest.mark.parametrize("target", ["test", "test-all", "bench"])
def test_a_path_in_pytest_args_is_all_that_runs(checkout, target):
    path = f"{target.removesuffix('-all').replace('test', 'tests')}/x.py::test_y"
    done = checkout(target, f"PYTEST_ARGS=-x {path}", program=MEASURES % 0)
    run = next(line.split() for line in done.stdout.splitlines() if line.startswith("run: "))
    assert path in run
    assert not {"tests", "bench"} & set(run)


def test_make_test_all_takes_the_slow_tests_as_well(checkout):
    done = checkout("test-all", "PYTEST_ARGS=-x")
    assert done.returncode == 0, done.stderr
    assert "run: -m pytest tests -m  -x" in done.stdout
    options = configparser.ConfigParser()
    options.read(ROOT / "pytest.ini")
    assert '-m "not slow"' in options["pytest"]["addopts"]


def test_make_bench_measures_then_runs_the_tools(checkout):
    done = checkout("bench", program=MEASURES % 0)
    assert done.returncode == 0, done.stderr
    (results,) = (checkout.root / "build/bench").glob("*-quick.json")
    name = results.relative_to(checkout.root)
    runs = [line for line in done.stdout.splitlines() if line.startswith("run: ")]
    assert runs[0] == f"run: -m pytest bench --sweep quick --results {name}"
    assert [run.split()[2] for run in runs[1:]] == ["tools.plot", "tools.verdict", "tools.report"]
    assert all(str(name) in run for run in runs)
    assert f"results: {name}" in done.stdout


def test_make_bench_reports_what_was_saved_and_fails_when_a_case_failed(checkout):
    done = checkout("bench", "SWEEP=bench/sweeps/linear/n_sweep.yaml", program=MEASURES % 1)
    assert done.returncode != 0
    assert "-n_sweep.json" in done.stdout
    assert "run: -m tools.report" in done.stdout


def test_make_bench_without_results_says_so(checkout):
    done = checkout("bench", program="exit 0")
    assert done.returncode != 0
    assert "no case was measured" in done.stderr
    assert not list((checkout.root / "build/bench").iterdir())


def test_make_bench_never_overwrites_earlier_results(checkout, monkeypatch):
    clock = checkout.root / "date"
    clock.write_text("#!/bin/sh\necho 20260101T000000Z\n")
    clock.chmod(0o755)
    monkeypatch.setenv("PATH", f"{checkout.root}:{os.environ['PATH']}")
    assert checkout("bench", program=MEASURES % 0).returncode == 0
    results = checkout.root / "build/bench/20260101T000000Z-quick.json"
    results.write_text("the first of this second")
    again = checkout("bench", program=MEASURES % 0)
    assert again.returncode != 0
    assert "File exists" in again.stderr
    checkout("clean")
    assert results.read_text() == "the first of this second"


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("version_info", "Block-Shock needs Python 3.10 or newer"),
        ("ensurepip", "cannot make virtual environments: venv or ensurepip is missing"),
    ],
)
def test_a_python_that_cannot_do_is_named_with_the_fix(checkout, lacks, message):
    old = checkout.root / "oldpython"
    old.write_text(f'#!/bin/sh\ncase "$2" in *{lacks}*) exit 1;; esac\n')
    old.chmod(0o755)
    done = checkout("lint", f"PYTHON={old}", installed=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "make PYTHON=python3.12" in done.stderr


def test_the_torch_of_the_machine_is_kept_only_when_asked_for(checkout):
    usual = checkout("-n", "lint", installed=False).stdout
    assert "-m venv  .venv" in usual
    assert "-c constraints.txt" in usual
    kept = checkout("-n", "lint", "VENV_ARGS=--system-site-packages", installed=False).stdout
    assert "-m venv --system-site-packages .venv" in kept
    assert "constraints.txt -e" not in kept


PROGRAMS = ["torch", "pytest", "pytest_benchmark", "yaml", "matplotlib", "hypothesis"]


@pytest.fixture
def given(tmp_path):
    """An environment that exists: this interpreter without its packages, and empty modules."""

    def make(*modules):
        folder = tmp_path / "given"
        for name in modules:
            (folder / "modules" / name).mkdir(parents=True)
            (folder / "modules" / name / "__init__.py").touch()
        python = folder / "bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(
            "#!/bin/sh\n"
            f'[ "$1" = -c ] || {{ echo "given: $*"; exit 0; }}\n'
            f'cd {folder}/modules 2>/dev/null || cd /\nexec {sys.executable} -S "$@"\n'
        )
        python.chmod(0o755)
        return folder

    return make


@pytest.mark.parametrize("by", ["command line", "environment"])
@pytest.mark.parametrize("target", ["test", "bench"])
def test_an_environment_that_is_given_is_used_as_it_is(checkout, given, target, by):
    folder = given(*PROGRAMS)
    before = sorted(folder.rglob("*"))
    if by == "environment":
        done = checkout(target, installed=False, VENV=str(folder))
    else:
        done = checkout(target, f"VENV={folder}", installed=False)
    folders = {"test": "tests", "bench": "bench"}
    assert f"given: -m pytest {folders[target]}" in done.stdout
    assert "run: " not in done.stdout, "this is .venv's python"
    assert "pip" not in done.stdout
    assert sorted(folder.rglob("*")) == before
    assert not (checkout.root / ".venv/installed").exists()
    checkout("clean", f"VENV={folder}")
    assert folder.exists()


def test_an_environment_that_lacks_something_is_one_clear_error(checkout, given):
    folder = given("torch", "yaml")
    done = checkout("bench", f"VENV={folder}", installed=False)
    assert done.returncode != 0
    (line, _) = done.stderr.splitlines()  # the second one is make's
    assert line.startswith(f"VENV={folder}: its python lacks pytest, pytest_benchmark, matplotlib.")
    assert not list((checkout.root / "build/bench").glob("*"))


def test_a_folder_that_is_no_environment_is_one_clear_error(checkout, tmp_path):
    done = checkout("test", f"VENV={tmp_path}/nowhere", installed=False)
    assert done.returncode != 0
    (line, _) = done.stderr.splitlines()
    assert line.startswith(f"VENV={tmp_path}/nowhere: no bin/python there.")


@pytest.mark.parametrize("status", [0, 1])
def test_pip_is_quiet_unless_it_fails(checkout, status):
    pip = f'case "$*" in *"pip install"*) echo "WARNING: noise" >&2; exit {status};; esac'
    python = checkout.root / "python3"
    python.write_text("#!/bin/sh\nexit 0\n")  # makes no environment: one stands already
    python.chmod(0o755)
    done = checkout("lint", f"PYTHON={python}", program=pip, installed=False)
    assert (done.returncode == 0) == (status == 0)
    assert ("WARNING: noise" in done.stderr) == bool(status)
    assert "WARNING: noise" not in done.stdout
    assert "WARNING: noise" in (checkout.root / "build/pip.log").read_text()


def test_the_gate_runs_lint_then_the_tests_and_pull_requests_do_as_well():
    gate = ROOT / ".ci/run"
    assert os.access(gate, os.X_OK)
    commands = [line for line in gate.read_text().splitlines() if line.startswith("make ")]
    assert commands[0] == "make lint"
    assert commands[-1].startswith("make test")
    assert re.search(r"^set -eu$", gate.read_text(), re.MULTILINE)
    jobs = json.dumps(yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"])
    assert all(f'"{command}"' in jobs for command in ("make lint", "make test"))
    assert "make test-all" in jobs
