"""A byte-level BPE, trained by the `tokenizers` library. Any text can be written in its tokens.

Token 0 is `<|endoftext|>`: it stands after each document, and nowhere else. A text that spells it
out, as sources of language models do, is written in ordinary tokens.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blockshock.lm.config import Refused

END = "<|endoftext|>"


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise Refused("the library tokenizers is missing; pip install 'blockshock[lm]'") from error
    return tokenizers


def train(texts: Iterable[str], vocabulary: int) -> Any:
    """A `tokenizers.Tokenizer` of exactly `vocabulary` tokens.

    Raises:
        Refused: the texts have too few different pairs for so many tokens.
    """
    lib = _library()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = lib.decoders.ByteLevel()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise Refused(
            f"data.vocabulary = {vocabulary}: the text has only {tokenizer.get_vocab_size()} "
            "tokens; lower it, or give more text"
        )
    return _literal(tokenizer)


def load(path: Path) -> Any:
    """The tokenizer of a file. Raises Refused where there is none."""
    if not path.is_file():
        raise Refused(f"{path}: no tokenizer there; run `python -m blockshock.lm prepare` first")
    return _literal(_library().Tokenizer.from_file(str(path)))


def _literal(tokenizer: Any) -> Any:
    """Lets no text stand for the end of a document. The tokenizer's file does not hold this."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def digest(tokenizer: Any) -> str:
    """Names a tokenizer by what it holds: 16 hexadecimal digits."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
