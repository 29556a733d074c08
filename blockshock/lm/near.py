"""Which texts are near copies of one another: MinHash over their lines.

The similarity of two texts is |A ∩ B| / |A ∪ B| of their sets of lines (Jaccard). Each line has a
hash; a text's sketch has the least hash in each of 32 bins (one permutation hashing, empty bins
filled from the next one: Shrivastava and Li, arXiv:1406.4784). Two texts are joined when 4 bins in
a row agree: similarity 0.5, 0.8, 0.9 is found with probability 0.40, 0.98, 0.9999. A group is what
is joined directly or through others.
"""

import hashlib
from collections.abc import Iterable

BINS, ROWS = 32, 4


def groups(texts: Iterable[str]) -> list[int]:
    """For each text the number of the first text of its group. Texts without lines stay alone."""
    parent: list[int] = []
    first: dict[tuple, int] = {}
    for number, text in enumerate(texts):
        parent.append(number)
        for band in _bands(text):
            other = _root(parent, first.setdefault(band, number))
            own = _root(parent, number)
            parent[max(own, other)] = min(own, other)
    return [_root(parent, number) for number in range(len(parent))]


def _root(parent: list[int], number: int) -> int:
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = parent[number]
    return number


def _bands(text: str) -> list[tuple]:
    bins: list[int | None] = [None] * BINS
    for line in {line.strip() for line in text.splitlines()} - {""}:
        word = int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little")
        place, word = word % BINS, word // BINS
        if bins[place] is None or word < bins[place]:
            bins[place] = word
    if all(word is None for word in bins):
        return []
    filled = list(bins)
    for place in range(2 * BINS - 1, -1, -1):  # around twice: the last bin fills from the first
        if filled[place % BINS] is None:
            filled[place % BINS] = filled[(place + 1) % BINS]
    return [(start, *filled[start : start + ROWS]) for start in range(0, BINS, ROWS)]
