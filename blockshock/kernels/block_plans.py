"""In which tiles the block-sparse kernels work: what is possible, and the rule where nothing was
measured (`block_sparse.plans` has what was).
"""

from dataclasses import dataclass

PROCESSORS = 132  # of an H200, and of an H100
SHARED, RESERVED = 228 * 1024, 1024  # bytes of a processor, and what each program takes besides
REGISTERS, OTHERS = 65536, 64  # of a processor, and of a thread besides its sums
SUMS = 128  # float32 of a thread
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Plan:
    """Of a product: `rows` rows of X a program, `step` columns of a tile at a time, and `each`
    programs a processor, which share the work; 0: a program for each line and part of X. Of dW:
    `rows` rows of a tile a program, `step` rows of X and dZ at a time. stages: of the loads.
    """

    rows: int
    step: int
    warps: int
    stages: int
    each: int = 0

    def __str__(self) -> str:
        shared = f", {self.each} a processor" if self.each else ""
        return f"{self.rows}x{self.step}, {self.warps} warps, {self.stages} stages{shared}"


# Reading X from L2 bounds the product, and a program reads the values once for all its rows: so as
# many rows as the sums have room for.
USUAL = {
    16: Plan(256, 16, 4, 4, 4),
    32: Plan(256, 32, 4, 3, 3),
    64: Plan(512, 64, 8, 2, 1),
    128: Plan(256, 64, 8, 3, 1),
    256: Plan(128, 64, 8, 3, 1),
}


def products(block: int, B: int) -> list[Plan]:
    """Plans for the product of B rows; the first one by rule."""
    enough, usual, found = max(64, 1 << (B - 1).bit_length()), USUAL[block], []
    for rows in (64, 128, 256, 512):
        if min(enough, 512) // 4 <= rows <= enough:
            found += _products(rows, block, usual.step)
            if rows == 512 and block == 64:  # three stages of whole tiles have no room
                found += _products(rows, block, 32)
    if enough < usual.rows:
        usual = next(p for p in found if p.rows == enough and p.stages >= 3 and p.each)
    return [usual, *(plan for plan in found if plan != usual)]


def gradients(block: int) -> list[Plan]:
    """Plans for dW at the kept tiles; the first one by rule."""
    rows = min(block, 128)
    return [
        Plan(rows, step, warps, stages)
        for step in (128, 64)
        for warps in _warps(rows, block)
        for stages in (3, 4, 2)
        if (rows + block) * step * 2 * stages <= SHARED - RESERVED
    ]


def pieces(programs: int, B: int, plan: Plan) -> int:
    """Into how many pieces the rows are cut, so that few tiles keep all processors at work."""
    return max(1, min(2 * PROCESSORS // programs, B // (4 * plan.step)))


def _products(rows: int, block: int, step: int) -> list[Plan]:
    """Those that fit: the loads of all stages, and the tile of Y beside them."""
    found = []
    for warps in _warps(rows, block):
        fewest = 2 if step == 64 else 3
        for stages in (fewest, fewest + 1):
            held = (rows + block) * step * 2 * stages + rows * block * 2 + RESERVED
            registers = 32 * warps * (rows * block // (32 * warps) + OTHERS)
            if held <= SHARED:
                each = min(SHARED // held, REGISTERS // registers, 4)
                found.append(Plan(rows, step, warps, stages, each))
                if stages == fewest:
                    found.append(Plan(rows, step, warps, stages))
    return found


def _warps(rows: int, block: int) -> list[int]:
    """4 where the sums have room in them, 8 where there is work for them."""
    sums = rows * block // 32
    return [w for w in (4, 8) if sums <= w * SUMS and (w == 4 or (rows >= 128 and sums >= 512))]
