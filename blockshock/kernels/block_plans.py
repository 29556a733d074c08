"""In which tiles the block-sparse kernels work: what is possible, and the rule where nothing was
measured (`block_sparse.plans` has what was).
"""

from dataclasses import dataclass

PROCESSORS = 132  # of an H200, and of an H100
SHARED = 227 * 1024 - 1024  # bytes of a program
SUMS = 128  # float32 of a thread
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Plan:
    """Of a product: `rows` rows of X a program, `step` columns of a tile at a time. Of dW: `rows`
    rows of a tile a program, `step` rows of X and dZ at a time. stages: of the pipeline of loads.
    """

    rows: int
    step: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.step}, {self.warps} warps, {self.stages} stages"


# Reading X from L2 bounds the product, and a program reads the values once for all its rows: so as
# many rows as the sums of 4 warps have room for, twice on a processor; of 8 warps from 128 on.
USUAL = {
    16: Plan(256, 16, 4, 4),
    32: Plan(256, 32, 4, 3),
    64: Plan(256, 64, 4, 2),
    128: Plan(256, 64, 8, 4),
    256: Plan(128, 64, 8, 4),
}


def products(block: int, B: int) -> list[Plan]:
    """Plans for the product of B rows; the first one by rule."""
    enough = max(64, 1 << (B - 1).bit_length())
    usual, found = USUAL[block], []
    if enough < usual.rows:
        usual = Plan(enough, usual.step, 8 if enough * block > 32 * 4 * SUMS else 4, 3)
    for rows in (64, 128, 256, 512):
        if min(enough, 512) // 4 <= rows <= enough:
            found += _all(rows, block, usual.step, (2, 3, 4))
    return [usual, *(plan for plan in found if plan != usual)]


def gradients(block: int) -> list[Plan]:
    """Plans for dW at the kept tiles; the first one by rule."""
    rows = min(block, 128)
    return [plan for step in (128, 64) for plan in _all(rows, block, step, (3, 4, 2))]


def pieces(programs: int, B: int, plan: Plan) -> int:
    """Into how many pieces the rows are cut, so that few tiles keep all processors at work."""
    return max(1, min(2 * PROCESSORS // programs, B // (4 * plan.step)))


def _all(rows: int, block: int, step: int, stages: tuple[int, ...]) -> list[Plan]:
    """Those whose sums and stages fit; 8 warps where there is work for them."""
    return [
        Plan(rows, step, warps, number)
        for warps in (4, 8)
        for number in stages
        if rows * block <= 32 * warps * SUMS
        and (warps == 4 or (rows >= 128 and rows * block >= 16384))
        and (rows + block) * step * 2 * number <= SHARED
    ]
