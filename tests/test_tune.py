"""The tuner's table: what is measured anew replaces the old, what is not stays, a file is whole."""

import json

import pytest
import torch

from blockshock import choices, tune
from blockshock.distributed.reduce import Plan


def product(N, B, kernel, mask="free", dtype="bfloat16", **seconds):
    size = {"N": N, "K": N, "B": B, "dtype": dtype, "mask": mask}
    return size | {"kernel": kernel, "seconds": seconds or {kernel: 1e-5}}


def sum_of(N, B, how, chunks=0, ranks=2, **seconds):
    size = {"ranks": ranks, "N": N, "K": N // ranks, "B": B, "dtype": "bfloat16"}
    return size | {"how": how, "chunks": chunks, "seconds": seconds or {how: 1e-5}}


def test_merge_replaces_the_same_sizes_and_keeps_the_others():
    old = {
        "products": [product(4096, 64, "thin"), product(4096, 64, "folded", mask="columns")],
        "sums": [sum_of(4096, 64, "collective"), sum_of(4096, 64, "two_shot", ranks=4)],
    }
    new = {
        "products": [product(4096, 64, "cusparselt"), product(64, 64, "thin", dtype="float16")],
        "sums": [sum_of(4096, 64, "exchange", 4)],
    }
    before = json.dumps([old, new])
    merged = tune.merge(old, new)
    kernels = {(e["N"], e["mask"], e["dtype"]): e["kernel"] for e in merged["products"]}
    assert len(merged["products"]) == 3
    assert kernels == {
        (4096, "free", "bfloat16"): "cusparselt",
        (4096, "columns", "bfloat16"): "folded",
        (64, "free", "float16"): "thin",
    }
    assert [(e["ranks"], e["how"], e["chunks"]) for e in merged["sums"]] == [
        (2, "exchange", 4),
        (4, "two_shot", 0),
    ]
    assert json.dumps([old, new]) == before


def test_merge_of_nothing_new_changes_nothing_and_sizes_are_in_order():
    table = {"products": [product(64, B, "thin") for B in (1024, 16, 128)], "sums": []}
    merged = tune.merge(table, {"products": [], "sums": []})
    assert [entry["B"] for entry in merged["products"]] == [16, 128, 1024]
    assert merged == tune.merge(merged, merged)
    assert tune.merge({"products": [], "sums": []}, table) == merged


def test_a_saved_table_is_read_as_it_was_an_entry_a_line(tmp_path):
    table = {
        "products": [product(4096, 64, "thin", thin=1.25e-5, cusparselt=3e-5)],
        "sums": [sum_of(4096, B, "exchange", 2) for B in (1, 64)],
    }
    file = tmp_path / "not" / "there" / "yet" / "GPU.json"
    for _ in range(2):  # also over itself
        tune.save(table, file)
        assert choices.read(file) == table
        assert list(file.parent.iterdir()) == [file]
    lines = file.read_text().splitlines()
    assert sum('"seconds"' in line for line in lines) == 3
    tune.save({"products": [], "sums": []}, file)
    assert choices.read(file) == {"products": [], "sums": []}


def test_a_table_that_cannot_be_written_whole_leaves_the_old_one(tmp_path):
    table, file = {"products": [product(64, 64, "thin")], "sums": []}, tmp_path / "GPU.json"
    tune.save(table, file)
    with pytest.raises(TypeError):
        tune.save({"products": [product(64, 64, "thin", thin=object())], "sums": []}, file)
    assert choices.read(file) == table


def test_what_was_tuned_is_what_auto_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSHOCK_CACHE", str(tmp_path))
    monkeypatch.setattr(choices, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(choices, "file_name", lambda: "GPU.json")
    table = {"products": [product(4096, 64, "thin")], "sums": [sum_of(4096, 64, "exchange", 2)]}
    tune.save(table, choices.folder() / choices.file_name())
    choices._table.cache_clear()
    try:
        size = {"N": 4000, "B": 50, "dtype": "bfloat16"}
        assert choices.fastest_product(K=4000, mask="free", **size) == "thin"
        found = choices.fastest_sum(ranks=2, K=2000, **size)
    finally:
        choices._table.cache_clear()
    assert Plan(found["how"], found["chunks"]) == Plan("exchange", 2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--ranks 3", ["--ranks 3", "found 2"]),
        ("--ranks 0", ["--ranks 0"]),
        ("--ranks -1", ["--ranks -1"]),
        ("--N 4096,100", ["--N 100", "multiple of 128"]),
        ("--N 64", ["--N 64", "multiple of 128"]),
        ("--N 0", ["--N", "'0'", "from 1 on"]),
        ("--B 64,-1", ["--B", "64,-1", "from 1 on"]),
        ("--B many", ["--B", "many"]),
        ("--dtype bf16,fp32", ["--dtype", "'fp32'", "bf16, fp16"]),
        ("--sizes 64", ["--sizes"]),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
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
    times = {"thin": 1.25e-5, "cusparselt": 2.5e-5, "folded": 1.5e-5}
    assert tune._line(product(4096, 64, "thin", mask="columns", **times)) == (
        "N=4096 K=4096 B=64 bfloat16 columns: thin 0.0125 ms; folded 1.20x, cusparselt 2.00x"
    )
    ways = {"exchange, 2 chunks": 1e-3, "collective": 4e-3, "two_shot": 1.5e-3}
    ways |= {"exchange, in one piece": 2e-3, "exchange, 4 chunks": 5e-3}
    assert tune._line(sum_of(4096, 64, "exchange", 2, **ways)) == (
        "N=4096 K=2048 B=64 bfloat16 sum over 2: exchange, 2 chunks 1.0000 ms; "
        "two_shot 1.50x, exchange, in one piece 2.00x, collective 4.00x"
    )


def test_candidates_are_what_the_gpu_and_the_mask_can_do(monkeypatch):
    for name in ("sparse24", "thin24"):
        monkeypatch.setattr(getattr(tune, name), "unsupported", lambda *_: None)
    assert tune._candidates("columns", 64, torch.bfloat16) == ["cusparselt", "thin", "folded"]
    assert tune._candidates("periodic", 64, torch.bfloat16) == ["cusparselt", "thin"]
    assert "thin" not in tune._candidates("free", 4096, torch.bfloat16)
    monkeypatch.setattr(tune.sparse24, "unsupported", lambda *_: "no cuSPARSELt")
    assert tune._candidates("free", 64, torch.bfloat16) == ["thin"]


@pytest.mark.gpus(2)
def test_two_ranks_measure_a_table_that_auto_can_read(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSHOCK_CACHE", str(tmp_path / "cache"))  # before the ranks start
    file = tmp_path / "GPU.json"
    assert tune.main(["--N", "256", "--B", "8,1024", "--out", str(file)]) == 0
    table = choices.read(file)
    assert len(table["products"]) == 2 * len(tune.KINDS)
    assert len(table["sums"]) == 2
    for entry in table["products"]:
        assert entry["kernel"] in entry["seconds"]
        assert ("thin" in entry["seconds"]) == (entry["B"] <= tune.THIN_ROWS)
    for entry in table["sums"]:
        assert str(Plan(entry["how"], entry["chunks"])) in entry["seconds"]
        assert "collective" in entry["seconds"]
        assert min(entry["seconds"].values()) > 0
