"""What each method is measured with.

`method: all` means those of the phase: plans of a decoder, or attentions of the hybrid block. Sums
over ranks are a list for all methods, or a mapping, `reduce: {tp: [collective, exchange]}`, where
the others keep the usual one. Patterns are those of `sparse_attention`.
"""

from itertools import product

from blockshock.phases.axes import combine
from blockshock.phases.transformer.case import USUAL_SUM, TransformerCase
from blockshock.phases.transformer.plans import OF_PHASE


def expand(case: type[TransformerCase], axes: dict, phase: str, ranks: int) -> list:
    """Every combination of the axes, for the methods that the phase has."""

    def chosen(method):
        sparse = method == "sparse_attention"
        found = product(
            _of_axis(axes["pattern"], method, None) if sparse else [None],
            _of_axis(axes["reduce"], method, USUAL_SUM),
        )
        return [{"pattern": pattern, "reduce": reduce} for pattern, reduce in found]

    own = {**axes, "method": [name for name in axes["method"] if name in OF_PHASE[phase]]}
    return combine(case, own, phase, ranks, chosen)


def _of_axis(axis: list | dict, method: str, usual: str | None) -> list:
    return axis.get(method, [usual]) if isinstance(axis, dict) else axis
