"""The command measures what "auto" would, tells it a line each, and refuses what makes no sense."""

import pytest
import torch

from blockshock import tune
from blockshock.kernels import cusparselt


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--ranks 3", ["--ranks 3", "found 2"]),
        ("--ranks 0", ["--ranks 0"]),
        ("--ranks -1", ["--ranks -1"]),
        ("--N 4096,100", ["N = 100", "multiple of 64"]),
        ("--method dense_single", ["dense_single", "block_shock"]),
        ("--mask best", ["--mask", "'best'", "tile"]),
        ("--N 0", ["--N", "'0'", "from 1 on"]),
        ("--B 64,-1", ["--B", "64,-1", "from 1 on"]),
        ("--B many", ["--B", "many"]),
        ("--dtype bf16,fp32", ["--dtype", "'fp32'", "bf16, fp16"]),
        ("--sizes 64", ["--sizes"]),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cusparselt, "unsupported", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        tune.main(arguments.split())
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert all(word in told for word in named), told


def test_too_few_gpus_are_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "--ranks 2: a GPU for each rank is needed, found 0" in capsys.readouterr().err


def test_a_line_tells_the_size_the_choice_and_the_next_three():
    seconds = {"b; collective": 2e-3, "a; exchange, 4 chunks": 1e-3, "c": 4e-3, "d": 3e-3, "e": 1.0}
    answer = {
        "question": "layer forward: B=64",
        "way": "a; exchange, 4 chunks",
        "source": "measured",
    }
    told = tune.line(answer | {"seconds": seconds, "took": 0.52})
    assert told == (
        "layer forward: B=64: a; exchange, 4 chunks 1.0000 ms; b; collective 2.00x, d 3.00x, "
        "c 4.00x (measured in 0.5 s)"
    )
    told = tune.line(answer | {"seconds": seconds, "took": 0.0, "source": "kept"})
    assert told.endswith("(kept)")


@pytest.mark.gpus(2)
def test_what_was_tuned_is_kept_for_later_uses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BLOCKSHOCK_CACHE", str(tmp_path))  # before the ranks start
    arguments = ["--N", "512", "--B", "8,1024", "--mask", "tile"]
    assert tune.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.count("measured in") == 8  # two methods, two batches, two directions
    assert tune.main(arguments) == 0
    assert capsys.readouterr().out.count("(kept)") == 8
