"""In which tiles the block-sparse kernels work: what is possible, and the rule where nothing was
measured (`block_sparse.plans` has what was).
"""

from dataclasses import dataclass

PROCESSORS = 132  # of an H200, and of an H100
SHARED = 227 * 1024 - 1024  # bytes of a program
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Plan:
    """ROWS of X a program, STEP columns of a tile at a time, for a product; for dW, HEIGHT rows of
    a tile a program, and STEP rows of X and dY at a time.
    """

    rows: int
    step: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.step}, {self.warps} warps, {self.stages} stages"


def products(block: int, B: int) -> list[Plan]:
    """Plans for the product of B rows; the first one by rule."""
    rows = min({16: 256, 32: 256, 64: 256, 128: 256, 256: 128}[block], _rows(B))
    step = min(block, 64)
    found = [
        Plan(rows, step, warps, stages)
        for rows in (64, 128, 256, 512)
        for warps in (4, 8)
        for stages in (2, 3, 4, 5)
        if _fits(rows, block, step, warps, stages) and rows <= max(64, 2 * B)
    ]
    first = [plan for plan in found if plan.rows == rows]
    usual = 8 if rows * block > 16384 else 4
    first.sort(key=lambda plan: (plan.warps != usual, abs(plan.stages - 3)))
    return [first[0], *(plan for plan in found if plan != first[0])]


def gradients(block: int) -> list[Plan]:
    """Plans for dW at the kept tiles; the first one by rule."""
    height = min(block, 128)
    found = [
        Plan(height, depth, warps, stages)
        for depth in (128, 64)
        for warps in (4, 8)
        for stages in (3, 4, 2)
        if _fits(height, block, depth, warps, stages)
    ]
    usual = 8 if height * block > 16384 else 4
    found.sort(key=lambda plan: plan.warps != usual)
    return found


def pieces(programs: int, B: int, plan: Plan) -> int:
    """Into how many pieces the rows are cut, so that few tiles keep all processors at work."""
    return max(1, min(2 * PROCESSORS // programs, B // (4 * plan.step)))


def _rows(B: int) -> int:
    return max(64, 1 << (B - 1).bit_length())


def _fits(rows: int, block: int, step: int, warps: int, stages: int) -> bool:
    """Sums in registers, a warpgroup's 64 rows, and stages in shared memory; two bytes an entry."""
    sums = rows * block // (32 * warps)
    return sums <= 128 and (rows + block) * step * 2 * stages <= SHARED
