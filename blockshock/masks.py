"""2:4 masks: which two of every four weights the first of two terms keeps.

    W = W∘M + W∘~M,   M bool [n, K],   two kept in every group of four along K

A mask and its complement are both 2:4, so the mask of term 0 says everything: term 1 has ~M.
A mask is *transposable* when it is cut from 4x4 tiles with two kept in every row and column;
then Mᵀ is 2:4 as well, and so is the product of the backward, dY·(W∘M).

Everything here is a function of its arguments and gives the same bits on every device and for
every cut of the weight into row blocks. A row block is rows start..start+n of the weight, with
all of K. Codes are the short form of a mask: one byte a group, i0 | i1 << 2, where i0 < i1 are
the positions kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor

PAIRS = tuple(combinations(range(4), 2))  # 1100 1010 1001 0110 0101 0011
# Weights handled at once: on a GPU it bounds tile_magnitude's scores to 300 MB; on a CPU they
# stay in the cache (ten times faster than in one piece at 1024 x 16384).
BLOCK_CPU, BLOCK = 1 << 20, 1 << 24


def _all_tiles() -> Tensor:
    rows = torch.zeros(len(PAIRS), 4, dtype=torch.bool)
    for index, pair in enumerate(PAIRS):
        rows[index, list(pair)] = True
    tiles = rows[torch.tensor(list(product(range(6), repeat=4)))]  # [1296, 4, 4]
    return tiles[(tiles.sum(dim=1) == 2).all(dim=1)]


TILES = _all_tiles()
"""The 90 tiles with two in every row and column, bool [90, 4, 4], in lexical order of their rows:
the first is {1100, 1100, 0011, 0011}."""


@dataclass(frozen=True)
class Pattern:
    """One way to choose a mask: choose(rows [n, K], start, seed) -> bool [n, K]."""

    choose: Callable[[Tensor, int, int], Tensor]
    transposable: bool = False  # made of tiles of TILES: the transposed mask is 2:4 too
    fixed: bool = False  # the same for every row: whole columns are kept
    needs_weight: bool = False  # depends on the values, not on the shape alone


def make(pattern: str, rows: Tensor, *, start: int = 0, seed: int = 0) -> Tensor:
    """The mask of term 0 for one row block of a weight; that of term 1 is its complement.

    Args:
        pattern: a name in PATTERNS.
        rows: [n, K], rows start..start+n of the weight, any real dtype and device.
        start: where the block begins. Tile patterns need start and n to be multiples of 4.
        seed: any integer; only "random" reads it.

    Returns:
        bool [n, K] on the device of rows, checked to be 2:4 (and transposable if it claims to be).

    Raises:
        ValueError: unknown pattern; rows not 2-D; K, or n and start for tiles, not a multiple of
            4; a weight that is not finite, whatever the pattern.
    """
    chosen = _pattern(pattern)
    rows = rows.detach()
    _check_shape(rows, "a weight")
    if chosen.transposable and (rows.shape[0] % 4 or start % 4):
        raise ValueError(
            f"{rows.shape[0]} rows from row {start}: pattern {pattern!r} is made of 4x4 tiles; "
            "cut the weight at multiples of 4 rows"
        )
    check_finite(rows, start=start)
    mask = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    block = BLOCK_CPU if rows.device.type == "cpu" else BLOCK
    step = max(4, block // max(rows.shape[1], 1) // 4 * 4)
    for at in range(0, rows.shape[0], step):
        mask[at : at + step] = chosen.choose(rows[at : at + step], start + at, seed)
    (check_transposable if chosen.transposable else check)(mask)
    return mask


def check(mask: Tensor) -> None:
    """ValueError unless mask, bool [n, K], keeps two in every group of four along K."""
    _check_mask(mask)
    bad = _kept_in_groups(mask) != 2
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        count = int(mask[row, 4 * group : 4 * group + 4].sum())
        raise ValueError(
            f"row {row}, group {group} (columns {4 * group} to {4 * group + 3}) keeps {count} of "
            "four: a 2:4 mask keeps exactly 2; make it with masks.make"
        )


def check_pair(a: Tensor, b: Tensor) -> None:
    """ValueError unless a and b, bool [n, K], are both 2:4 and each other's exact complement."""
    check(a)
    check(b)
    if a.shape != b.shape:
        raise ValueError(
            f"masks of {tuple(a.shape)} and {tuple(b.shape)}: a pair covers one weight; "
            "use the complement, ~a"
        )
    bad = a == b
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        which = "both keep" if bool(a[row, column]) else "neither keeps"
        raise ValueError(
            f"{which} row {row}, column {column}: the terms share every weight out once; "
            "use the complement, ~a"
        )


def check_transposable(mask: Tensor) -> None:
    """ValueError unless mask and its transpose are both 2:4; mask is bool [n, K]."""
    check(mask)
    if mask.shape[0] % 4:
        raise ValueError(
            f"{mask.shape[0]} rows: a transposable mask is made of 4x4 tiles; "
            "pad the weight to a multiple of 4 rows"
        )
    bad = _kept_in_groups(mask.T) != 2
    if bad.any():
        column, group = bad.nonzero()[0].tolist()
        count = int(mask[4 * group : 4 * group + 4, column].sum())
        raise ValueError(
            f"column {column}, rows {4 * group} to {4 * group + 3} keep {count} of four: the "
            'transpose is not 2:4; use pattern "tile" or "tile_magnitude"'
        )


def check_finite(rows: Tensor, *, start: int = 0, what: str = "the weight") -> None:
    """ValueError naming the place where rows [n, K] are not finite; they begin at row start."""
    finite = rows.isfinite()
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{what} is {rows[row, column].item()} at row {start + row}, column {column}: "
            "values must be finite; repair it (torch.nan_to_num), or use bf16 where fp16 overflows"
        )


def encode(mask: Tensor) -> Tensor:
    """Codes uint8 [n, K/4] of a 2:4 mask, bool [n, K]; ValueError where it is not 2:4."""
    check(mask)
    left0, left1, left2, left3 = _groups(~mask).view(torch.uint8).unbind(-1)
    first = left0 + left0 * left1  # 1 if position 0 is left out, 2 if 1 is as well
    last = 3 - left3 - left3 * left2
    return first | last << 2


def decode(codes: Tensor) -> Tensor:
    """The mask, bool [n, K], of codes uint8 [n, K/4]; it is not checked (see check)."""
    position = torch.arange(4, dtype=torch.uint8, device=codes.device)
    group = codes.unsqueeze(-1)
    return ((group & 3 == position) | (group >> 2 == position)).flatten(-2)


def complement(codes: Tensor) -> Tensor:
    """The codes of the other term: encode(~mask) from encode(mask), any shape, uint8."""
    # 8 + 13 = 12 + 9 = 21 but 4 + 14 = 18: the codes of 1010/0101, 1001/0110 and 1100/0011
    return 21 - codes - 3 * ((codes == 4) | (codes == 14)).to(torch.uint8)


def transpose(codes: Tensor) -> Tensor:
    """The codes [K, n/4] of the transposed mask; ValueError where it is not transposable.

    The codes of row blocks (multiples of 4 rows) may be transposed one by one and joined along
    dim 1.
    """
    mask = decode(codes)
    check_transposable(mask)
    return encode(mask.T)


def period(codes: Tensor) -> tuple[int, int, int, int] | None:
    """The codes of rows 0 to 3 where the mask repeats after four rows and one group, else None.

    codes uint8 [n, K/4], n a multiple of 4. True of the fixed patterns and of "tile".
    """
    first = codes[:4, :1]
    for rows in codes.split(4096):
        if not bool((rows.view(-1, 4, rows.shape[1]) == first).all()):
            return None
    return tuple(first.flatten().tolist())


def places(code: int) -> tuple[int, int]:
    """The two kept places of a group with this code."""
    return code & 3, code >> 2


def kept_columns(
    pattern: str, K: int, term: int, *, device: torch.device | str | None = None
) -> Tensor:
    """The columns that term 0 or 1 keeps under a fixed pattern: int64 [K/2], ascending.

    Raises:
        ValueError: unknown pattern, one that is not fixed, K not a multiple of 4, another term.
    """
    if not _pattern(pattern).fixed:
        fixed = ", ".join(name for name, each in PATTERNS.items() if each.fixed)
        raise ValueError(
            f"pattern {pattern!r} keeps other columns in each row: only a fixed pattern keeps "
            f"whole columns; use one of {fixed}"
        )
    if term not in (0, 1):
        raise ValueError(f"term {term!r}: a weight is held as two terms; use 0 or 1")
    if K % 4:
        raise ValueError(f"K = {K}: groups of four run along K; pad K to a multiple of 4")
    kept = [position for position in range(4) if (pattern[position] == "1") == (term == 0)]
    groups = torch.arange(0, K, 4, device=device)
    return torch.stack([groups + position for position in kept], dim=1).flatten()


def _fixed(name: str) -> Pattern:
    bits = [character == "1" for character in name]

    def choose(rows: Tensor, start: int, seed: int) -> Tensor:
        group = torch.tensor(bits, device=rows.device)
        return group.repeat(rows.shape[1] // 4).expand(rows.shape)

    return Pattern(choose, fixed=True)


def _random(rows: Tensor, start: int, seed: int) -> Tensor:
    """Each group draws one of the six pairs, each as likely, from a SplitMix64 stream.

    Row r of the weight has a stream of its own, whose seed is output r of the stream seeded by
    (the mix of) the mask's seed; group j reads output j. A bit thus depends on (seed, row, group)
    alone. Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    n, groups = rows.shape[0], rows.shape[1] // 4
    device = rows.device
    seed = _signed(seed % (1 << 64))
    base = _mix(torch.full((1,), seed, dtype=torch.int64, device=device))
    row_seeds = _mix(base + torch.arange(start + 1, start + n + 1, device=device) * _GOLDEN)
    steps = torch.arange(1, groups + 1, device=device) * _GOLDEN
    drawn = _mix(row_seeds[:, None] + steps)
    pair = (_shift(drawn, 32) * 6 >> 32).to(torch.uint8)  # 6 in 2^32 from uniform
    codes = torch.zeros_like(pair)
    for index, (first, last) in enumerate(PAIRS):
        codes.masked_fill_(pair == index, first | last << 2)
    return decode(codes)


def _magnitude(rows: Tensor, start: int, seed: int) -> Tensor:
    """The two largest |w| of four; among equals the lower index is kept."""
    size = _groups(rows.abs()).unbind(-1)
    larger = [torch.zeros_like(size[0], dtype=torch.uint8) for _ in range(4)]
    for i, j in PAIRS:
        loses = size[j] > size[i]  # i, the lower index, wins a tie
        larger[i] += loses
        larger[j] += ~loses
    return torch.stack([count < 2 for count in larger], dim=-1).flatten(1)


def _tile(rows: Tensor, start: int, seed: int) -> Tensor:
    """The first tile everywhere: rows 0 and 1 of four keep 1100, rows 2 and 3 keep 0011."""
    tile = TILES[0].to(rows.device)
    return tile.repeat(rows.shape[0] // 4, rows.shape[1] // 4)


def _tile_magnitude(rows: Tensor, start: int, seed: int) -> Tensor:
    """Of the 90 tiles the one that keeps the largest sum of |w|; among equals the first.

    Sums are made in float32 (float64 for float64) in one fixed order, row pairs first: additions
    alone, so every device rounds alike.
    """
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    n, K = rows.shape
    size = (
        rows.to(exact).abs().reshape(n // 4, 4, K // 4, 4).permute(1, 3, 0, 2)
    )  # row, column, tile
    pair = [[size[row, i] + size[row, j] for i, j in PAIRS] for row in range(4)]
    top = {(p, q): pair[0][p] + pair[1][q] for p in range(6) for q in range(6)}
    bottom = {(p, q): pair[2][p] + pair[3][q] for p in range(6) for q in range(6)}
    best = torch.full((n // 4, K // 4), -1, dtype=exact, device=rows.device)
    choice = torch.zeros((n // 4, K // 4), dtype=torch.uint8, device=rows.device)
    for index, (a, b, c, d) in enumerate(_TILE_ROWS):
        score = top[a, b] + bottom[c, d]
        choice.masked_fill_(score > best, index)
        torch.maximum(best, score, out=best)
    tiles = TILES.to(rows.device)[choice.int()]  # [n/4, K/4, 4, 4]
    return tiles.permute(0, 2, 1, 3).reshape(n, K)


_TILE_ROWS = [[PAIRS.index(tuple(row.nonzero()[:, 0].tolist())) for row in tile] for tile in TILES]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits).bitwise_and_((1 << 64 - bits) - 1)  # logical: int64's own keeps the sign


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)).mul_(_MULTIPLY[0])
    z = z.bitwise_xor_(_shift(z, 27)).mul_(_MULTIPLY[1])
    return z.bitwise_xor_(_shift(z, 31))


def _pattern(name: str) -> Pattern:
    if name not in PATTERNS:
        raise ValueError(f"unknown pattern {name!r}; use one of {', '.join(PATTERNS)}")
    return PATTERNS[name]


def _check_shape(tensor: Tensor, what: str) -> None:
    if tensor.ndim != 2 or tensor.shape[1] % 4:
        raise ValueError(
            f"shape {tuple(tensor.shape)}: {what} is [rows, K] with K a multiple of 4; pad K"
        )


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask of {mask.dtype}: masks are bool, True = kept; use mask.bool()")
    _check_shape(mask, "a mask")


def _groups(tensor: Tensor) -> Tensor:
    return tensor.unflatten(-1, (-1, 4))


def _kept_in_groups(mask: Tensor) -> Tensor:
    a, b, c, d = _groups(mask.view(torch.uint8)).unbind(-1)
    return a + b + c + d


PATTERNS: dict[str, Pattern] = {
    "1100": _fixed("1100"),
    "1010": _fixed("1010"),
    "1001": _fixed("1001"),
    "random": Pattern(_random),
    "magnitude": Pattern(_magnitude, needs_weight=True),
    "tile": Pattern(_tile, transposable=True),
    "tile_magnitude": Pattern(_tile_magnitude, transposable=True, needs_weight=True),
}
