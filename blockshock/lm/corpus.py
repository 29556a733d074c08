"""Sources of text, each with a training and a validation part that share nothing.

    python                    the .py files of this Python installation: its standard library and
                              the installed packages
    tinystories, openwebtext  by the `datasets` library, which downloads them
    a path                    a text file, or a folder of text files

Files are kept once by content and ordered by the hash of their content, so the place of an
installation does not matter. Files that are near copies of one another (`near`) go to one side
together; which side, the hash of the group's first file says. A single text file is cut in two at a
line: its end is for validation. OpenWebText is split by the hash of each document.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blockshock.lm import near
from blockshock.lm.config import Data, Refused

LARGEST = 2**20  # bytes; longer sources in an installation are tables that a program wrote
DATASETS = {"tinystories": "roneneldan/TinyStories", "openwebtext": "Skylion007/openwebtext"}


@dataclass(frozen=True)
class Corpus:
    """Two ways to go through texts, as often as wanted, and a line on what they are."""

    train: Callable[[], Iterator[str]]
    validation: Callable[[], Iterator[str]]
    about: str


def open_corpus(data: Data) -> Corpus:
    """The corpus that `data` names.

    Raises:
        Refused: no such path, no text in it, a library is missing, a data set cannot be loaded.
    """
    if data.source in DATASETS:
        return _dataset(data, DATASETS[data.source])
    if data.validation == 0:
        raise Refused("data.validation = 0: this source has no split of its own; give a share")
    if data.source == "python":
        places = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
        found = [file for place in sorted(places) for file in Path(place).rglob("*.py")]
        return _files(data, found, LARGEST)
    path = Path(data.source).expanduser()
    if path.is_dir():
        inside = (p.relative_to(path).parts for p in path.rglob("*"))
        shown = [path.joinpath(*parts) for parts in inside if not any(p[0] == "." for p in parts)]
        return _files(data, [file for file in shown if file.is_file()], None)
    if path.is_file():
        return _one_file(data, path)
    names = ", ".join(["python", *DATASETS])
    raise Refused(f"data.source = {data.source!r}: no such path; give a path, or one of {names}")


def _files(data: Data, files: list[Path], largest: int | None) -> Corpus:
    texts: dict[str, str] = {}  # by the hash of the content
    skipped = 0
    for file in files:
        try:
            if largest and file.stat().st_size > largest:
                raise ValueError("too long")
            text = file.read_text("utf-8")
        except (OSError, ValueError):  # a broken link, or another encoding
            skipped += 1
            continue
        if text.strip():
            texts[_digest(text)] = text
    kept, size = [], 0
    for digest in sorted(texts):
        size += len(texts[digest].encode())
        if data.max_bytes and size > data.max_bytes and kept:
            break
        kept.append(digest)
    sides: tuple[list[str], list[str]] = ([], [])
    for digest, leader in zip(kept, near.groups(texts[d] for d in kept), strict=True):
        sides[_is_validation(kept[leader], data.validation)].append(texts[digest])
    left_out = ""
    if skipped:
        left_out = f"; {skipped} left out: no UTF-8 text"
        left_out += f", or longer than {largest} bytes" if largest else ""
    if not all(sides):
        raise Refused(
            f"data.source = {data.source!r}: {len(kept)} files of text, {len(sides[1])} of them "
            f"for validation{left_out}. Each side needs at least one: give more files, raise "
            "data.max_bytes, or change data.validation"
        )
    about = f"{len(sides[0])} + {len(sides[1])} files{left_out}"
    return Corpus(lambda: iter(sides[0]), lambda: iter(sides[1]), about)


def _one_file(data: Data, path: Path) -> Corpus:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"data.source = {path}: not UTF-8 ({error}); convert it") from error
    if data.max_bytes:
        text = text.encode()[: data.max_bytes].decode(errors="ignore")
    cut = text.rfind("\n", 0, int(len(text) * (1 - data.validation))) + 1
    if not 0 < cut < len(text):
        raise Refused(
            f"data.source = {path}: no line ends where {data.validation:g} of the text would be "
            "cut off for validation; give a longer file, or change data.validation"
        )
    return Corpus(lambda: iter([text[:cut]]), lambda: iter([text[cut:]]), "one file, cut in two")


def _dataset(data: Data, path: str) -> Corpus:
    """A data set with a column `text`; its own validation split where it has one."""
    try:
        import datasets
    except ImportError as error:
        raise Refused(
            f"data.source = {data.source}: the library datasets is missing; "
            "pip install 'blockshock[data]'"
        ) from error
    try:
        loaded = datasets.load_dataset(path)
    except Exception as error:  # it raises errors of many libraries
        raise Refused(
            f"data.source = {data.source}: {path} cannot be loaded ({error}). It is downloaded at "
            "the first use: connect to the network, or copy the cache of datasets here"
        ) from error

    def texts(split: str, wanted: int | None) -> Iterator[str]:
        size = 0
        for row in loaded[split]:
            text = row["text"]
            size += len(text.encode())  # of both sides, where they share a split
            if data.max_bytes and size > data.max_bytes:
                return
            if wanted is not None and _is_validation(_digest(text), data.validation) != wanted:
                continue
            if text.strip():
                yield text

    if "validation" in loaded:
        sides = [("train", None), ("validation", None)]
    elif data.validation == 0:
        raise Refused(f"data.validation = 0: {path} has no split of its own; give a share")
    else:
        sides = [("train", 0), ("train", 1)]
    train, validation = (lambda side=side: texts(*side) for side in sides)
    return Corpus(train, validation, f"{path}, {sum(map(len, loaded.values()))} documents")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _is_validation(digest: str, share: float) -> bool:
    # The last digits: files are chosen by the first ones, where max_bytes limits them.
    return int(digest[-15:], 16) < share * 16**15
