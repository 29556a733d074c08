"""What each method is measured with.

`method: all` means those of the phase: plans of a decoder, or attentions of the hybrid block. The
sums over ranks are a list for all methods, or a mapping, `reduce: {tp: [collective, exchange]}`,
where the others keep the usual one.
"""

from blockshock.phases.axes import combine
from blockshock.phases.transformer.case import USUAL_SUM, TransformerCase
from blockshock.phases.transformer.plans import OF_PHASE


def expand(case: type[TransformerCase], axes: dict, phase: str, ranks: int) -> list:
    """Every combination of the axes, for the methods that the phase has."""
    sums = axes["reduce"]

    def chosen(method):
        taken = sums.get(method, [USUAL_SUM]) if isinstance(sums, dict) else sums
        return [{"reduce": one} for one in taken]

    own = {**axes, "method": [name for name in axes["method"] if name in OF_PHASE[phase]]}
    return combine(case, own, phase, ranks, chosen)
