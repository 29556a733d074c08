"""Of the measured sizes the nearest one decides, and the user's own table goes first."""

import json

import pytest
import torch

from blockshock import choices
from blockshock.kernels import products


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """tables(user=…, shipped=…) writes the two tables of a GPU that is not there."""
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    monkeypatch.setattr(choices, "folder", lambda: user)
    monkeypatch.setattr(choices, "SHIPPED", shipped)
    monkeypatch.setattr(choices, "file_name", lambda: "Some-GPU.json")

    def write(**by_place):
        for name, table in by_place.items():
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            text = table if isinstance(table, str) else json.dumps(table)
            (folder / "Some-GPU.json").write_text(text)
        choices.forget()
        products.choose.cache_clear()

    choices._table.cache_clear()
    yield write
    choices._table.cache_clear()


def product(N, B, kernel, K=None, dtype="bfloat16", mask="free"):
    return {"N": N, "K": K or N, "B": B, "dtype": dtype, "mask": mask, "kernel": kernel}


def sum_of(N, B, how, chunks=0, K=None, ranks=2, dtype="bfloat16"):
    size = {"N": N, "K": K or N // 2, "B": B, "dtype": dtype}
    return {"ranks": ranks, **size, "how": how, "chunks": chunks}


def fastest(N, B, K=None, dtype="bfloat16", mask="free"):
    return choices.fastest_product(N=N, K=K or N, B=B, dtype=dtype, mask=mask)


def test_the_nearest_measured_size_decides_by_ratios_not_by_differences(tables):
    tables(user={"products": [product(4096, 64, "thin"), product(4096, 1024, "cusparselt")]})
    assert fastest(4096, 64) == fastest(4096, 1) == fastest(4096, 255) == "thin"
    assert fastest(4096, 257) == fastest(4096, 10**6) == "cusparselt"  # 256 is half way
    assert fastest(65536, 100) == "thin"
    assert fastest(64, 2000) == "cusparselt"


def test_all_three_sizes_count_alike(tables):
    entries = [product(4096, 64, "a", K=4096), product(8192, 64, "b"), product(4096, 64, "c", 8192)]
    tables(user={"products": entries})
    assert fastest(4096, 64, K=5000) == "a"
    assert fastest(7000, 64, K=7000) == "b"
    assert fastest(4096, 64, K=7000) == "c"
    assert fastest(5000, 64, K=8192) == "c"


def test_dtype_mask_and_ranks_must_be_the_same(tables):
    tables(
        user={
            "products": [product(64, 64, "folded", mask="columns"), product(8192, 64, "thin")],
            "sums": [sum_of(64, 64, "exchange", 2), sum_of(8192, 64, "two_shot", ranks=4)],
        }
    )
    assert fastest(64, 64) == "thin"  # though the other one has just this size
    assert fastest(64, 64, mask="columns") == "folded"
    assert fastest(64, 64, mask="periodic") is None
    assert fastest(64, 64, dtype="float16") == "thin"  # as many bytes, and not measured itself
    assert fastest(64, 64, dtype="float32") is None
    wanted = {"N": 64, "K": 32, "B": 64, "dtype": "bfloat16"}
    assert choices.fastest_sum(ranks=4, **wanted)["how"] == "two_shot"
    assert choices.fastest_sum(ranks=2, **wanted)["chunks"] == 2
    assert choices.fastest_sum(ranks=8, **wanted) is None
    assert choices.fastest_sum(ranks=2, **wanted | {"dtype": "float32"}) is None


def test_of_equals_the_users_entry_is_taken_else_the_nearer_one(tables):
    tables(
        user={"products": [product(4096, 64, "thin")]},
        shipped={"products": [product(4096, 64, "cusparselt"), product(16384, 64, "folded")]},
    )
    assert fastest(4096, 64) == "thin"
    assert fastest(2048, 64) == "thin"
    assert fastest(16384, 64) == "folded"


def test_the_shipped_table_stands_where_the_user_has_none(tables):
    tables(shipped={"products": [product(4096, 64, "cusparselt")], "sums": []})
    assert fastest(4096, 64) == "cusparselt"


def test_without_a_table_nothing_is_known(tables):
    tables()
    assert fastest(4096, 64) is None
    assert choices.fastest_sum(ranks=2, N=64, K=32, B=1, dtype="bfloat16") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"products"', '{"products": 3}', "\x00"])
def test_a_damaged_table_is_an_empty_one(tables, text):
    tables(user=text, shipped={"products": [product(4096, 64, "cusparselt")]})
    assert fastest(4096, 64) == "cusparselt"
    assert choices.fastest_sum(ranks=2, N=64, K=32, B=1, dtype="bfloat16") is None


def test_a_table_that_is_no_text_is_an_empty_one(tmp_path):
    file = tmp_path / "table.json"
    file.write_bytes(b"\xff\xfe\x00")
    assert choices.read(file) == {"products": [], "sums": []}
    assert choices.read(tmp_path) == {"products": [], "sums": []}
    assert choices.read(tmp_path / "absent.json") == {"products": [], "sums": []}


def test_entries_that_lack_a_field_are_left_out_and_further_fields_stay(tmp_path):
    whole = product(4096, 64, "thin") | {"seconds": {"thin": 1e-5}}
    lacking = [{k: v for k, v in whole.items() if k != gone} for gone in ("B", "kernel", "mask")]
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"products": [*lacking, whole], "later": [1]}))
    assert choices.read(file) == {"products": [whole], "sums": []}


def test_the_users_folder_is_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKSHOCK_CACHE", str(tmp_path))
    assert choices.folder() == tmp_path
    monkeypatch.delenv("BLOCKSHOCK_CACHE")
    assert choices.folder().parts[-2:] == (".cache", "blockshock")


def test_tables_that_are_shipped_can_be_read_whole():
    for file in choices.SHIPPED.glob("*.json"):
        raw, table = json.loads(file.read_text()), choices.read(file)
        assert table == {kind: raw.get(kind, []) for kind in choices.KINDS}, file.name
        assert any(table.values()), file.name


def test_auto_follows_the_table_and_without_one_what_is_usually_fastest(tables, monkeypatch):
    def chosen(kernel, mask, rows, dtype=torch.bfloat16):
        return products.choose(kernel, mask, rows, (4096, 4096), dtype, torch.device("cuda"))

    monkeypatch.setattr(products.thin24, "unsupported", lambda *_: None)
    tables(user={"products": [product(4096, 64, "cusparselt", mask="columns")]})
    assert chosen("auto", "columns", 64) == "cusparselt"
    assert chosen("auto", "columns", 64, torch.float16) == "cusparselt"
    assert chosen("auto", "free", 64) == chosen("auto", "free", 0) == "thin"
    assert chosen("auto", "periodic", 65) == "cusparselt"
    for asked in ("cusparselt", "thin", "folded"):
        assert chosen(asked, "columns", 64) == asked
    products.choose.cache_clear()
    monkeypatch.setattr(products.thin24, "unsupported", lambda *_: "no sparse tensor cores")
    assert chosen("auto", "free", 64) == "cusparselt"


def test_a_masks_kind_is_what_its_period_says():
    assert products.kind(None) == "free"
    assert products.kind((4, 4, 4, 4)) == "columns"
    assert products.kind((4, 4, 14, 14)) == "periodic"
