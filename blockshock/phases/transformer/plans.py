"""What is compared in each phase: sync plans of a decoder, and attentions of the hybrid block.

A plan is named by a rule that holds for any depth, so that models of several depths stand in one
figure; `transformer.sync` names it by its syncs.

    tp          after every sublayer: standard tensor parallelism            2 depth syncs
    spd         after every block                                              depth
    spd_mixed   after every block in the first half, then every 2 blocks       depth · 3/4
    spd_K       after every K blocks                                           depth / K
    desync      after every block; each rank keeps a stream of its own         depth
    parallel    after every block; attention and MLP have the same input       depth
"""

from fractions import Fraction

# The name of a rule -> syncs a block.
GROUPS = {
    "tp": Fraction(2),
    "spd": Fraction(1),
    "spd_mixed": Fraction(3, 4),
    "spd_2": Fraction(1, 2),
    "spd_3": Fraction(1, 3),
    "spd_4": Fraction(1, 4),
    "spd_6": Fraction(1, 6),
}
OTHERS = {"desync": "desync:{depth}", "parallel": "parallel"}
PLANS = (*GROUPS, *OTHERS)
BLOCKS = ("dense_attention", "sparse_attention")  # attention of the hybrid block
DECODER = ("sync", "decode")
HYBRID = ("hybrid_forward", "hybrid_backward")
OF_PHASE = {**dict.fromkeys(DECODER, PLANS), **dict.fromkeys(HYBRID, BLOCKS)}


def unsupported(rule: str, depth: int) -> str | None:
    """Why a decoder of this depth has no such plan, or None."""
    syncs = GROUPS.get(rule, Fraction(1)) * depth
    if syncs.denominator == 1:
        return None
    least = GROUPS[rule].denominator
    return f"{rule} needs a depth that is a multiple of {least}, and depth = {depth}"


def name(rule: str, depth: int) -> str:
    """The name of a rule's plan in `transformer.sync`; for what is not `unsupported`."""
    if rule in OTHERS:
        return OTHERS[rule].format(depth=depth)
    return str(GROUPS[rule] * depth)
