"""In which tiles the block-sparse kernels work: what is possible, and the rule where nothing was
measured (`block_sparse.plans` has what was).
"""

from dataclasses import dataclass

PROCESSORS = 132  # of an H200, and of an H100
SHARED, RESERVED = 228 * 1024, 1024  # bytes of a processor, and what each program takes besides
SUMS = 128  # float32 of a thread


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


# Reading X and W from L2 bounds the product, and a program reads W once for all its rows: so as
# many rows as the sums have room for. Loads should always be on their way: so as many stages as
# two to four programs a processor have room for. First of a block: what is taken where nothing was
# measured. On an H200 (bf16, 4096 rows and more, a twentieth to two fifths of the tiles kept) the
# first for 32 and 64 were 1.01 and 1.06 times as slow as the fastest, on average of 768x3072 to
# 8192x8192, and the first for 128 1.01 times at 8192x8192. 16 and 256 were not measured.
PRODUCTS = {
    16: (
        Plan(256, 16, 4, 6), Plan(512, 16, 4, 4), Plan(256, 16, 4, 5, 4), Plan(512, 16, 4, 3, 3),
        Plan(128, 16, 4, 6), Plan(64, 16, 4, 6),
    ),
    32: (
        Plan(512, 32, 4, 3), Plan(256, 32, 4, 3), Plan(256, 32, 4, 4), Plan(256, 32, 4, 3, 3),
        Plan(128, 32, 4, 4), Plan(64, 32, 4, 6),
    ),
    64: (
        Plan(256, 32, 4, 4, 2), Plan(256, 32, 4, 3), Plan(256, 32, 4, 5), Plan(256, 64, 4, 2, 2),
        Plan(512, 32, 8, 4, 1), Plan(128, 64, 4, 3), Plan(128, 64, 4, 2), Plan(128, 64, 4, 2, 3),
        Plan(64, 64, 4, 4),
    ),
    128: (
        Plan(256, 64, 8, 4, 1), Plan(128, 64, 4, 3, 2), Plan(256, 64, 8, 3, 1), Plan(128, 64, 4, 3),
        Plan(64, 64, 4, 3),
    ),
    256: (
        Plan(64, 64, 4, 2), Plan(64, 32, 4, 5), Plan(128, 64, 8, 3, 1), Plan(64, 64, 4, 2, 2),
    ),
}  # fmt: skip
# Of dW. There the first for 32 and 64 were 1.03 and 1.04 times as slow as the fastest; that for
# 128 was the fastest.
GRADIENTS = {
    16: (Plan(16, 128, 4, 2), Plan(16, 128, 4, 3), Plan(16, 64, 4, 2), Plan(16, 64, 4, 3)),
    32: (Plan(32, 128, 4, 3), Plan(32, 128, 4, 2), Plan(32, 64, 4, 3), Plan(32, 64, 4, 2)),
    64: (Plan(64, 64, 4, 4), Plan(64, 128, 4, 3), Plan(64, 64, 4, 3)),
    128: (Plan(128, 64, 4, 3), Plan(128, 64, 8, 3), Plan(128, 64, 4, 4)),
    256: (Plan(128, 64, 8, 3), Plan(128, 64, 8, 4), Plan(128, 128, 8, 2)),
}
BLOCKS = tuple(PRODUCTS)


def products(block: int, B: int) -> list[Plan]:
    """Plans for the product of B rows; the first one by rule."""
    enough = max(64, 1 << (B - 1).bit_length())
    least = min(enough // 4, 4096 // block)
    return [plan for plan in PRODUCTS[block] if least <= plan.rows <= enough]


def halves(plan: Plan, block: int) -> int:
    """In how many pieces a tile of Y is written: 2 where a whole one has no room beside loads."""
    loads = (plan.rows + block) * plan.step * 2 * plan.stages
    room = SHARED // max(plan.each, 1) - RESERVED
    return 2 if plan.each and loads + plan.rows * block * 2 > room else 1


def pieces(programs: int, B: int, plan: Plan) -> int:
    """Into how many pieces the rows are cut, so that few tiles keep all processors at work."""
    return max(1, min(2 * PROCESSORS // programs, B // (4 * plan.step)))
