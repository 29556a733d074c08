"""Text to tokens: trains the tokenizer on the training text and writes both token files.

<data.folder>/tokenizer.json  train.bin  train.json  validation.bin  validation.json
<data.folder>/prepared.json   the settings they were made with: written last, so that it says
                              that all is there
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from blockshock.lm import corpus, tokenizer
from blockshock.lm.config import Data, Refused
from blockshock.lm.tokens import TokenFile, write
from blockshock.runs.files import alone, written_whole

TOGETHER = 512  # documents that the library encodes at once, on all cores
TRAIN_BYTES = 2**28  # of text that the tokenizer is trained on; more does not change it much


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What training reads: two token files and the tokenizer, with its digest."""

    train: TokenFile
    validation: TokenFile
    tokenizer: Any
    digest: str


def prepare(data: Data, tell: Callable[[str], None]) -> None:
    """Makes the folder, unless it is there already. tell: takes a line on what is done.

    Where another run is making it, waits for that.

    Raises:
        Refused: as the corpus and the tokenizer do; or the folder was made with other settings.
    """
    if not _is_made(data):
        busy = f"waiting: another process is preparing {data.folder}"
        with alone(Path(data.folder), lambda: tell(busy)):
            if not _is_made(data):
                _make(data, tell)
                return
    tell(f"prepared already: {data.folder}")


def _make(data: Data, tell: Callable[[str], None]) -> None:
    folder = Path(data.folder)
    source = corpus.open_corpus(data)
    tell(f"training a tokenizer of {data.vocabulary} tokens on {data.source} ({source.about})")
    made = tokenizer.train(_first_bytes(source.train(), TRAIN_BYTES), data.vocabulary)
    with written_whole(folder / "tokenizer.json") as out:
        out.write(made.to_str().encode())
    about = {"tokenizer": tokenizer.digest(made), "source": data.source}
    for name, texts in (("train", source.train()), ("validation", source.validation())):
        ids = _encoded(made, texts)
        count = write(folder / f"{name}.bin", ids, vocabulary=data.vocabulary, about=about)
        tell(f"{folder / name}.bin: {count} tokens")
    with written_whole(folder / "prepared.json") as out:
        out.write(json.dumps(_settings(data), indent=1).encode())


def open_prepared(data: Data) -> Prepared:
    """The folder that `prepare` made. Raises Refused where it is not there or does not fit."""
    folder = Path(data.folder)
    if not _is_made(data):
        raise Refused(f"{folder}: no tokens there; run `python -m blockshock.lm prepare` first")
    made = tokenizer.load(folder / "tokenizer.json")
    digest = tokenizer.digest(made)
    train, validation = (
        TokenFile(folder / f"{name}.bin", data.vocabulary, digest)
        for name in ("train", "validation")
    )
    return Prepared(train, validation, made, digest)


def _is_made(data: Data) -> bool:
    path = Path(data.folder) / "prepared.json"
    if not path.is_file():
        return False
    made, wanted = json.loads(path.read_text()), _settings(data)
    other = [f"data.{key} = {made.get(key)!r}" for key in wanted if made.get(key) != wanted[key]]
    if other:
        raise Refused(
            f"data.folder = {data.folder} was prepared with {', '.join(other)}; choose another "
            "data.folder, or delete this one"
        )
    return True


def _settings(data: Data) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(data).items() if key != "folder"}


def _first_bytes(texts: Iterable[str], most: int) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text
        size += len(text.encode())
        if size >= most:
            return


def _encoded(made: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    """The tokens of each text and the end of a document behind it."""
    end = made.token_to_id(tokenizer.END)
    some: list[str] = []
    for text in texts:
        some.append(text)
        if len(some) == TOGETHER:
            yield from _encode(made, some, end)
            some = []
    yield from _encode(made, some, end)


def _encode(made: Any, texts: list[str], end: int) -> Iterator[list[int]]:
    for found in made.encode_batch(texts, add_special_tokens=False):
        yield [*found.ids, end]
