"""Which texts are near copies of one another: MinHash over their lines.

The similarity of two texts is |A ∩ B| / |A ∪ B| of their sets of lines (Jaccard). Each line has a
hash; a text's sketch has the least hash in each of 64 bins (one permutation hashing, empty bins
filled from the next one: Shrivastava and Li, arXiv:1406.4784). The share of bins that agree
estimates the similarity, ± 0.06. Texts are compared where 4 bins in a row agree, which finds a
similarity of 0.5, 0.7, 0.8 with probability 0.64, 0.99, 0.9998, and are joined when half of all
bins agree: chance agreement alone would chain unrelated files to one another.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

BINS, ROWS, ALIKE = 64, 4, 0.5


def groups(texts: Iterable[str]) -> list[int]:
    """For each text the number of the first text of its group: those joined, also through others.

    A text without lines stays alone.
    """
    parent: list[int] = []
    sketches: list[list[int]] = []
    buckets: dict[tuple, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        parent.append(number)
        sketches.append(sketch := _sketch(text))
        for start in range(0, len(sketch), ROWS):
            bucket = buckets[(start, *sketch[start : start + ROWS])]
            near = [other for other in bucket if _alike(sketch, sketches[other])]
            for other in near:
                one, two = sorted((_root(parent, number), _root(parent, other)))
                parent[two] = one
            if not near:  # else its near copy stands for it
                bucket.append(number)
    return [_root(parent, number) for number in range(len(parent))]


def _root(parent: list[int], number: int) -> int:
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = parent[number]
    return number


def _alike(one: list[int], two: list[int]) -> bool:
    return sum(a == b for a, b in zip(one, two, strict=True)) >= ALIKE * BINS


def _sketch(text: str) -> list[int]:
    bins: list[int | None] = [None] * BINS
    for line in {line.strip() for line in text.splitlines()} - {""}:
        word = int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little")
        place, word = word % BINS, word // BINS
        if bins[place] is None or word < bins[place]:
            bins[place] = word
    if all(word is None for word in bins):
        return []
    for place in range(2 * BINS - 1, -1, -1):  # twice around: the last bin fills from the first
        if bins[place % BINS] is None:
            bins[place % BINS] = bins[(place + 1) % BINS]
    return bins
