"""What ranks tell each other by a store: each turn its own, whoever the ranks are."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from blockshock.distributed import agree


@pytest.fixture(params=["file", "hash"])
def turn(request, tmp_path, monkeypatch):
    """turn(texts, seconds): what ranks of one group's name are told; a text of None does not come.

    Each rank is a thread that knows nothing of the turns before, as a new process does.
    """
    here, shared = threading.local(), dist.HashStore()
    monkeypatch.setattr(agree.collectives, "group_size", lambda group: here.size)
    monkeypatch.setattr(agree.collectives, "group_rank", lambda group: here.rank)
    monkeypatch.setattr(agree, "_name", lambda group: "one")
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: here.store)

    def told(rank, texts, seconds):
        here.rank, here.size = rank, len(texts)
        here.store = shared if request.param == "hash" else dist.FileStore(str(tmp_path / "s"), -1)
        try:
            return agree.told_by_all(texts[rank], about="a test", seconds=seconds)
        except RuntimeError as error:
            return str(error)

    def run(texts, seconds=20.0):
        with ThreadPoolExecutor(len(texts)) as pool:
            ranks = [rank for rank, text in enumerate(texts) if text is not None]
            return list(pool.map(lambda rank: told(rank, texts, seconds), ranks))

    return run


def test_groups_of_one_name_and_of_other_sizes_are_told_their_own(turn):
    for size in (2, 3, 2, 4, 3, 2):
        for number in range(4):
            texts = [f"{size} ranks, {number}: {rank}" for rank in range(size)]
            assert turn(texts) == [texts] * size


def test_a_rank_that_does_not_come_spoils_no_later_turn(turn):
    assert turn(["a", "b"]) == [["a", "b"]] * 2
    for lonely in (["c", None], [None, "c"], ["d", None]):
        (text,) = turn(lonely, seconds=0.3)
        assert "has not come" in text
    assert turn(["e", "f"]) == [["e", "f"]] * 2
