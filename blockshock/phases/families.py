"""The families of the laboratory: a line each. Their parts are in the folder of that name."""

from blockshock.phases.attention import FAMILY as attention
from blockshock.phases.block_sparse import FAMILY as block_sparse
from blockshock.phases.case import Case
from blockshock.phases.data_parallel import FAMILY as data_parallel
from blockshock.phases.family import Family
from blockshock.phases.linear import FAMILY as linear
from blockshock.phases.transformer import FAMILY as transformer

FAMILIES = {
    "linear": linear,
    "attention": attention,
    "data_parallel": data_parallel,
    "transformer": transformer,
    "block_sparse": block_sparse,
}


def family(case: Case) -> Family:
    """The family of a case. Raises ValueError for a phase that it does not have."""
    found = FAMILIES[case.family]
    if case.phase not in found.phases:
        raise ValueError(f"unknown phase {case.phase!r}; use one of {', '.join(found.phases)}")
    return found
