"""Which numbers of rows share an answer, so that a loop over many of them need not measure each.

    rows up to 64        classes of 8:    1 to 8, 9 to 16, …
    up to 1024           classes of 64:   65 to 128, …
    beyond               eight classes between a power of two and the next

A number of rows from which on a sum may be cut into more chunks (`reduce.plans`) is a class by
itself, because those below it do not have that way.
"""

import re

from blockshock.distributed.reduce import CHUNKS, FEWEST_ROWS

CUTS = {chunks * FEWEST_ROWS for chunks in CHUNKS}  # multiples of 64: each ends a class
_ROWS = re.compile(r"\bB=(\d+)\b")


def span(rows: int) -> tuple[int, int]:
    """The first and the last number of rows of a class; rows: one of them, 1 or more."""
    width = 8 if rows <= 64 else max(64, 1 << (rows - 1).bit_length() - 4)
    last = -(-rows // width) * width
    if rows in CUTS:
        return rows, rows
    return last - width + 1, last - (last in CUTS)


def split(question: str) -> tuple[str, int]:
    """(the question of its class, its rows): "B=100" becomes "B=65..128", and 100.

    A question without "B=" is a class by itself, and its rows are 0.
    """
    found = _ROWS.search(question)
    if found is None:
        return question, 0
    rows = int(found[1])
    first, last = span(rows)
    return f"{question[: found.start()]}B={first}..{last}{question[found.end() :]}", rows
