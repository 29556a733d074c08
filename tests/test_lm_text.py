"""From text to batches: corpora, near copies, the tokenizer, token files."""

import json
import random
import sys
import sysconfig
from contextlib import ExitStack
from types import ModuleType

import pytest
import torch

from blockshock.lm import near, tokenizer, tokens
from blockshock.lm.config import Data, Refused
from blockshock.lm.corpus import open_corpus
from blockshock.lm.prepare import open_prepared, prepare
from blockshock.lm.tokens import Batches, TokenFile
from blockshock.runs.files import alone

pytest.importorskip("tokenizers", reason="the extra lm is not installed")


def written(seed, lines=40):
    """A text of lines that no other seed has."""
    return "".join(
        f"line {seed} {i} {random.Random(seed * 1000 + i).random()}\n" for i in range(lines)
    )


def changed(text, share, seed=0):
    """The text with a share of its lines replaced."""
    lines = text.splitlines()
    for i in random.Random(seed).sample(range(len(lines)), int(share * len(lines))):
        lines[i] = f"other {i} {seed}"
    return "\n".join(lines)


def test_near_copies_are_grouped_and_others_are_not():
    base = [written(i) for i in range(30)]
    copies = [changed(text, 0.1, i) for i, text in enumerate(base)]
    boilerplate = "import os\n\n\ndef main():\n    return 0\n"  # a tenth in common chains nothing
    texts = (
        [boilerplate + text for text in base] + [boilerplate + text for text in copies] + ["", ""]
    )
    found = near.groups(texts)
    assert found[:30] == list(range(30))
    assert found[30:60] == list(range(30))
    assert found[60:] == [60, 61]


def test_short_near_copies_are_grouped():
    assert near.groups(["a\nb\nc", "x\ny\nz", "a\nb\nc\n", "a b c"]) == [0, 1, 0, 3]


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "texts"
    (place / "deep").mkdir(parents=True)
    for i in range(40):
        (place / f"deep/{i}.txt").write_text(written(i))
        (place / f"near{i}.txt").write_text(changed(written(i), 0.1, i))
        (place / f"same{i}.txt").write_text(written(i))
    (place / "binary.bin").write_bytes(b"\xff\xfe\x00\x80")
    (place / ".hidden").write_text("secret\n")
    return place


def test_a_folder_is_split_by_file_and_no_copy_crosses(folder, tmp_path):
    corpus = open_corpus(Data(source=str(folder), validation=0.3))
    train, held = list(corpus.train()), list(corpus.validation())
    assert len(train) + len(held) == 80  # exact copies once
    assert 10 < len(held) < 40
    assert "1 left out" in corpus.about
    seeds = [
        {int(line.split()[1]) for t in side for line in t.splitlines() if line[0] == "l"}
        for side in (train, held)
    ]
    assert not seeds[0] & seeds[1]
    assert not set(train) & set(held)
    moved = folder.rename(tmp_path / "moved")
    again = open_corpus(Data(source=str(moved), validation=0.3))
    assert (list(again.train()), list(again.validation())) == (train, held)


def test_fewer_bytes_are_the_first_files_and_still_split(folder):
    some = open_corpus(Data(source=str(folder), validation=0.3, max_bytes=40_000))
    train, held = list(some.train()), list(some.validation())
    size = sum(len(text.encode()) for text in train + held)
    assert 36_000 < size <= 40_000
    assert train
    assert held


def test_python_is_the_files_of_an_installation(folder, monkeypatch):
    for i in range(40):
        (folder / f"{i}.py").write_text(f"# python\n{written(100 + i)}")
    (folder / "long.py").write_text("x = 1\n" * 2**18)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    corpus = open_corpus(Data(source="python", validation=0.2))
    texts = [*corpus.train(), *corpus.validation()]
    assert len(texts) == 40
    assert all(text.startswith("# python") for text in texts)


def test_a_single_file_keeps_its_end_for_validation(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("".join(f"line {i}\n" for i in range(100)))
    corpus = open_corpus(Data(source=str(file), validation=0.1))
    (train,), (held,) = corpus.train(), corpus.validation()
    assert train + held == file.read_text()
    assert held.startswith("line ")
    assert 8 <= held.count("\n") <= 12


def test_sources_that_cannot_be_are_refused(tmp_path, folder):
    with pytest.raises(Refused, match="no such path; give a path, or one of python, tinystories"):
        open_corpus(Data(source=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match="0 files of text"):
        open_corpus(Data(source=str(tmp_path / "empty")))
    (tmp_path / "empty/binary").write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match=r"0 files of text, .*; 1 left out: no UTF-8 text"):
        open_corpus(Data(source=str(tmp_path / "empty")))
    with pytest.raises(Refused, match=r"data\.validation = 0: this source has no split"):
        open_corpus(Data(source=str(folder), validation=0.0))
    (tmp_path / "short.txt").write_text("no end of a line")
    with pytest.raises(Refused, match="no line ends"):
        open_corpus(Data(source=str(tmp_path / "short.txt")))
    (tmp_path / "latin.txt").write_bytes("äöü\n".encode("latin-1"))
    with pytest.raises(Refused, match="not UTF-8"):
        open_corpus(Data(source=str(tmp_path / "latin.txt")))


def library(monkeypatch, splits):
    """A stand-in for `datasets` that has these splits, or raises what it is given."""
    module, asked = ModuleType("datasets"), []

    def load_dataset(path):
        asked.append(path)
        if isinstance(splits, Exception):
            raise splits
        return splits

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_with_a_validation_split_keeps_it(monkeypatch):
    rows = {"train": [{"text": "a"}, {"text": " "}, {"text": "b"}], "validation": [{"text": "c"}]}
    asked = library(monkeypatch, rows)
    corpus = open_corpus(Data(source="tinystories"))
    assert (list(corpus.train()), list(corpus.validation())) == (["a", "b"], ["c"])
    assert asked == ["roneneldan/TinyStories"]


def test_a_data_set_without_one_is_split_by_document(monkeypatch):
    asked = library(monkeypatch, {"train": [{"text": written(i, 1)} for i in range(200)] * 2})
    corpus = open_corpus(Data(source="openwebtext", validation=0.2))
    train, held = list(corpus.train()), list(corpus.validation())
    assert len(train) + len(held) == 400
    assert 40 < len(held) < 120
    assert not set(train) & set(held)
    assert asked == ["Skylion007/openwebtext"]
    some = open_corpus(Data(source="openwebtext", validation=0.2, max_bytes=5000))
    sides = list(some.train()), list(some.validation())
    assert all(sides)
    assert 4900 < sum(len(text.encode()) for side in sides for text in side) <= 5000


def test_a_data_set_that_cannot_be_had_says_what_to_do(monkeypatch):
    library(monkeypatch, ConnectionError("no network"))
    with pytest.raises(Refused, match=r"cannot be loaded \(no network\).*connect to the network"):
        open_corpus(Data(source="tinystories"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Refused, match=r"pip install 'blockshock\[data\]'"):
        open_corpus(Data(source="tinystories"))


def test_a_local_data_set_goes_through_the_library_itself(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the extra data is not installed")
    from blockshock.lm import corpus

    for split, number in (("train", 30), ("validation", 3)):
        lines = [json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(number)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(corpus.DATASETS, "tinystories", str(tmp_path))
    found = open_corpus(Data(source="tinystories"))
    assert list(found.train()) == [f"train {i}" for i in range(30)]
    assert list(found.validation()) == [f"validation {i}" for i in range(3)]


def test_the_tokenizer_writes_any_text_and_reads_it_back(tmp_path):
    made = tokenizer.train([written(i) for i in range(10)], 300)
    assert made.get_vocab_size() == 300
    assert made.token_to_id(tokenizer.END) == 0
    text = "line 3\n\tüñí 漢字 🙂 \x00 end"
    assert made.decode(made.encode(text).ids) == text
    (tmp_path / "t.json").write_text(made.to_str())
    assert tokenizer.digest(tokenizer.load(tmp_path / "t.json")) == tokenizer.digest(made)
    for one in (made, tokenizer.load(tmp_path / "t.json")):  # a text cannot end a document
        ids = one.encode(f"line {tokenizer.END} 3").ids
        assert 0 not in ids
        assert one.decode(ids) == f"line {tokenizer.END} 3"
    with pytest.raises(Refused, match=r"data\.vocabulary = 5000: the text has only"):
        tokenizer.train(["a few words"], 5000)
    with pytest.raises(Refused, match="no tokenizer there"):
        tokenizer.load(tmp_path / "nowhere.json")


ABOUT = {"tokenizer": "t", "source": "s"}


@pytest.mark.parametrize(("vocabulary", "dtype"), [(300, torch.uint16), (70_000, torch.uint32)])
def test_a_token_file_holds_what_was_written(tmp_path, vocabulary, dtype):
    ids = [[0, 1, 2], [], [vocabulary - 1] * 4]
    assert tokens.write(tmp_path / "a.bin", ids, vocabulary=vocabulary, about=ABOUT) == 7
    file = TokenFile(tmp_path / "a.bin", vocabulary, "t")
    assert file.tokens.dtype == dtype
    assert file.tokens.tolist() == [0, 1, 2, *[vocabulary - 1] * 4]
    assert file.facts["largest"] == vocabulary - 1
    x, y = file.take([0, 1], 3)
    assert (x.tolist(), y[0].tolist()) == (
        [[0, 1, 2], [vocabulary - 1] * 3],
        [1, 2, vocabulary - 1],
    )


def test_a_token_file_that_is_not_what_it_says_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(Refused, match="prepare"):
        TokenFile(path, 300)
    with pytest.raises(Refused, match="outside"):
        tokens.write(path, [[1, 300]], vocabulary=300, about=ABOUT)
    assert not path.exists()
    tokens.write(path, [list(range(100))], vocabulary=300, about=ABOUT)
    with pytest.raises(Refused, match="token 99 is beyond the model's vocabulary of 50"):
        TokenFile(path, 50)
    with pytest.raises(Refused, match="tokenizer t, and u"):
        TokenFile(path, 300, "u")
    file = TokenFile(path, 300)
    file.tokens[20] = 999  # the mapping is this process's own
    with pytest.raises(Refused, match="token 999 is beyond the vocabulary"):
        file.take([1], 16)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Refused, match="199 bytes"):
        TokenFile(path, 300)


def whole(tmp_path, count=101):
    tokens.write(tmp_path / "a.bin", [list(range(count))], vocabulary=300, about=ABOUT)
    return TokenFile(tmp_path / "a.bin", 300)


def test_an_epoch_reads_every_token_once_over_all_ranks(tmp_path):
    file, sizes = whole(tmp_path), {"context": 5, "batch": 2, "ranks": 2}
    ranks = [Batches(file, seed=3, rank=rank, **sizes) for rank in range(2)]
    read = []
    for position in range(0, 20, 4):
        for batches in ranks:
            x, y = batches.at(position)
            assert torch.equal(y, x + 1)
            read += x.flatten().tolist()
    assert sorted(read) == list(range(100))
    assert read != sorted(read)
    second = [tuple(row) for p in range(20, 40, 4) for b in ranks for row in b.at(p)[0].tolist()]
    assert len(set(second)) == 20
    assert [t for row in second for t in row] != read


def test_a_batch_depends_on_its_position_and_seed_alone(tmp_path):
    file = whole(tmp_path)
    make = lambda seed: Batches(file, context=5, batch=3, seed=seed)  # noqa: E731
    one, two = make(0), make(0)
    for position in (0, 18, 300, 3):  # an epoch ends inside a batch, and one goes back
        assert torch.equal(one.at(position)[0], make(0).at(position)[0])
    assert torch.equal(one.at(3)[0], two.at(3)[0])
    assert not torch.equal(make(1).at(0)[0], two.at(0)[0])


def test_too_little_text_for_a_batch_says_how_much_is_needed(tmp_path):
    with pytest.raises(Refused, match=r"101 tokens, and one batch .* needs 641"):
        Batches(whole(tmp_path), context=16, batch=20, seed=0, ranks=2)


def test_who_prepares_what_another_prepares_waits_and_uses_it(tmp_path, folder):
    data = Data(source=str(folder), folder=str(tmp_path / "out"), vocabulary=300, validation=0.3)
    told, held = [], ExitStack()

    def tell(line):
        told.append(line)
        if line.startswith("waiting"):  # the other one ends
            (tmp_path / "made").rename(tmp_path / "out/prepared.json")
            held.close()

    prepare(data, told.append)
    (tmp_path / "out/prepared.json").rename(tmp_path / "made")
    told.clear()
    held.enter_context(alone(tmp_path / "out", lambda: None))
    prepare(data, tell)
    assert told[0].startswith("waiting: another process is preparing")
    assert told[1:] == [f"prepared already: {tmp_path / 'out'}"]


def test_preparing_twice_does_nothing_and_other_settings_are_refused(tmp_path, folder):
    data = Data(source=str(folder), folder=str(tmp_path / "out"), vocabulary=300, validation=0.3)
    told = []
    with pytest.raises(Refused, match="prepare"):
        open_prepared(data)
    prepare(data, told.append)
    made = open_prepared(data)
    text = made.tokenizer.decode(made.train.tokens.tolist(), skip_special_tokens=False)
    assert text.count(tokenizer.END) == len(list(open_corpus(data).train()))
    prepare(data, told.append)
    assert told[-1] == f"prepared already: {tmp_path / 'out'}"
    other = Data(source=str(folder), folder=data.folder, vocabulary=310, validation=0.3)
    with pytest.raises(Refused, match=r"was prepared with data\.vocabulary = 300; choose another"):
        prepare(other, told.append)
