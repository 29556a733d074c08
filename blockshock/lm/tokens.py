"""Token files: integers in a row, memory-mapped, with a JSON beside that says what they are.

    train.bin    uint16 (vocabulary up to 65536) or uint32, in the byte order of the machine
    train.json   {"dtype", "byteorder", "vocabulary", "tokenizer", "count", "largest", "source"}

A batch is a set of windows of T + 1 tokens: inputs w[:-1], targets w[1:]. The file has n windows,
T apart, so each token is a target at most once in an epoch. Epoch e is a permutation of the windows
seeded by (seed, e). Sequence i of a run, counted over all ranks and steps, is window
perm_e[i mod n], e = i // n: the position in the data is the one number i.
"""

import array
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from blockshock.lm.config import Refused
from blockshock.runs.files import written_whole
from blockshock.runs.order import Order

DTYPES = {"uint16": (torch.uint16, "H"), "uint32": (torch.uint32, "I")}


def write(path: Path, lists: Iterable[list[int]], *, vocabulary: int, about: dict[str, Any]) -> int:
    """Writes `path` (.bin) and its JSON, the JSON last; returns the number of tokens.

    lists: token ids. about: what else the JSON holds ("tokenizer", "source").

    Raises:
        Refused: a token beyond the vocabulary, or the disk is full.
    """
    name = "uint16" if vocabulary <= 2**16 else "uint32"
    count, largest = 0, -1
    path.with_suffix(".json").unlink(missing_ok=True)
    with written_whole(path) as out:
        for ids in lists:
            if not ids:
                continue
            if not (min(ids) >= 0 and max(ids) < vocabulary):
                raise Refused(
                    f"{path}: a token outside 0 … {vocabulary - 1}: {min(ids)}, {max(ids)}"
                )
            count, largest = count + len(ids), max(largest, *ids)
            out.write(array.array(DTYPES[name][1], ids).tobytes())
    facts = {
        "dtype": name,
        "byteorder": sys.byteorder,
        "vocabulary": vocabulary,
        "count": count,
        "largest": largest,
        **about,
    }
    with written_whole(path.with_suffix(".json")) as out:
        out.write(json.dumps(facts, indent=1).encode())
    return count


class TokenFile:
    """A token file, open for reading.

    Attributes: `tokens` [count] uint16 or uint32, mapped; `facts`, its JSON; `path`.

    Raises:
        Refused: no such file, one that is torn, or one whose tokens exceed `vocabulary`.
    """

    def __init__(self, path: Path, vocabulary: int, tokenizer: str | None = None):
        self.path, self.vocabulary = path, vocabulary
        try:
            self.facts = json.loads(path.with_suffix(".json").read_text())
            size = path.stat().st_size
        except (OSError, ValueError) as error:
            raise Refused(
                f"{path}: no token file there ({error}); run `python -m blockshock.lm prepare`"
            ) from error
        dtype, letter = DTYPES[self.facts["dtype"]]
        count = self.facts["count"]
        if size != count * array.array(letter).itemsize or self.facts["byteorder"] != sys.byteorder:
            raise Refused(
                f"{path}: {size} bytes, {sys.byteorder}-endian, where its JSON says {count} of "
                f"{self.facts['dtype']}, {self.facts['byteorder']}-endian; delete it and "
                "prepare again"
            )
        if self.facts["largest"] >= vocabulary:
            raise Refused(
                f"{path}: token {self.facts['largest']} is beyond the model's vocabulary of "
                f"{vocabulary}; prepare again with data.vocabulary = {vocabulary}"
            )
        if tokenizer is not None and self.facts["tokenizer"] != tokenizer:
            raise Refused(
                f"{path} was written with tokenizer {self.facts['tokenizer']}, and {tokenizer} "
                "lies beside it; delete the folder and prepare again"
            )
        self.tokens = torch.from_file(str(path), shared=False, size=count, dtype=dtype)

    def windows(self, context: int) -> int:
        """How many windows of context + 1 tokens there are."""
        return max(0, (len(self.tokens) - 1) // context)

    def take(self, windows: list[int], context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [len(windows), context] int64, on the CPU.

        Raises:
            Refused: a token beyond the vocabulary: the file was changed after it was written.
        """
        rows = torch.stack([self.tokens[w * context : (w + 1) * context + 1] for w in windows])
        rows = rows.to(torch.int64)
        if (largest := int(rows.max())) >= self.vocabulary:
            raise Refused(
                f"{self.path}: token {largest} is beyond the vocabulary of {self.vocabulary}; the "
                "file was changed after it was written. Delete its folder and prepare again"
            )
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # copied to a GPU as one piece


class Batches:
    """The batches of one rank, by position alone: nothing is kept but a permutation at hand.

    Raises:
        Refused: the file is too short for one batch of all ranks.
    """

    def __init__(self, file: TokenFile, *, context: int, batch: int, seed: int, rank=0, ranks=1):
        self.file, self.context, self.batch = file, context, batch
        self.rank, self.ranks = rank, ranks
        check_size(file, context, batch, ranks)
        self.order = Order(file.windows(context), seed)

    def at(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's inputs and targets [batch, context] where all ranks have read `position`."""
        first = position + self.rank * self.batch
        windows = [self.order[first + i] for i in range(self.batch)]
        return self.file.take(windows, self.context)


def check_size(file: TokenFile, context: int, batch: int, ranks: int) -> None:
    """Raises Refused where a file is too short for one batch on each rank."""
    if file.windows(context) < batch * ranks:
        raise Refused(
            f"{file.path}: {len(file.tokens)} tokens, and one batch of {batch} sequences of "
            f"{context} on {ranks} ranks needs {batch * ranks * context + 1}; give more text "
            "(data.max_bytes, data.validation), or lower train.batch or model.context"
        )
