"""The families that the tools know. To show another one, give it a folder here and a line below."""

from tools.cases import Results
from tools.families.attention.page import FAMILY as ATTENTION
from tools.families.block_sparse.page import FAMILY as BLOCK_SPARSE
from tools.families.data_parallel.page import FAMILY as DATA_PARALLEL
from tools.families.linear.page import FAMILY as LINEAR
from tools.families.transformer.page import FAMILY as TRANSFORMER
from tools.family import Family

FAMILIES: dict[str, Family] = {
    "linear": LINEAR,
    "attention": ATTENTION,
    "data_parallel": DATA_PARALLEL,
    "transformer": TRANSFORMER,
    "block_sparse": BLOCK_SPARSE,
}


def held(results: Results) -> dict[str, tuple[Family, Results]]:
    """Each family that the results hold with its results: the known ones in order, then others."""
    found = dict.fromkeys(result.case.family for result in results.results)
    names = [name for name in FAMILIES if name in found]
    names += [name for name in found if name not in FAMILIES]
    return {name: (FAMILIES.get(name) or Family(name), results.only(name)) for name in names}
