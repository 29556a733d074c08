"""A checkpoint is written whole or not at all, and fits its model or is refused."""

import subprocess
import sys

import pytest
import torch

from blockshock.lm import checkpoint
from blockshock.lm.config import Refused
from blockshock.runs import files
from tests.lm_runs import ROOT


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "run" / checkpoint.NAME
    checkpoint.save(path, {"step": 3, "model": {"w": torch.arange(5)}})
    for place in (path, path.parent):
        found = checkpoint.load(place)
        assert found["step"] == 3
        assert torch.equal(found["model"]["w"], torch.arange(5))
    assert [file.name for file in path.parent.iterdir()] == [checkpoint.NAME]


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_crash_at_any_moment_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / checkpoint.NAME
    checkpoint.save(path, {"step": 1})

    class Crash(BaseException):
        pass

    def crash(*_, **__):
        raise Crash

    if moment == "write":
        monkeypatch.setattr(torch, "save", crash)
    elif moment == "fsync":
        monkeypatch.setattr(files.os, "fsync", crash)
    else:
        monkeypatch.setattr(files.Path, "replace", crash)
    with pytest.raises(Crash):
        checkpoint.save(path, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 1
    checkpoint.save(path, {"step": 3})
    assert checkpoint.load(path)["step"] == 3


FULL = """
import resource, sys
from pathlib import Path
import torch
from blockshock.lm import checkpoint
from blockshock.lm.config import Refused
path = Path(sys.argv[1])
checkpoint.save(path, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    checkpoint.save(path, {"step": 2, "model": torch.zeros(2**20)})
except Refused as error:
    print(error)
"""


def test_a_full_disk_is_one_error_and_the_old_file_stays(tmp_path):
    path = tmp_path / checkpoint.NAME
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{path} cannot be written: File too large" in done.stdout
    assert "the file that was there is kept" in done.stdout
    assert checkpoint.load(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.NAME]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(Refused, match="no checkpoint there"):
        checkpoint.load(tmp_path)
    path = tmp_path / checkpoint.NAME
    for content in (b"", b"text", b"PK\x03\x04torn"):
        path.write_bytes(content)
        with pytest.raises(Refused, match=r"no checkpoint of blockshock\.lm"):
            checkpoint.load(path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(Refused, match=r"no checkpoint of blockshock\.lm"):
        checkpoint.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(Refused, match="format 99, and this version reads 1"):
        checkpoint.load(path)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"format": 1, "step": Evil()}, tmp_path / checkpoint.NAME)
    with pytest.raises(Refused):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "made").exists()
