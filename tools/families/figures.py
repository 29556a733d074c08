"""The figures of the plots and the report: one function each, gathered in FIGURES, and those of
attention in ATTENTION_FIGURES.

A function takes Results and gives Drawings, or raises Absent with the reason why there are none.
"""

import functools
from collections.abc import Callable

import matplotlib

from tools.cases import Results
from tools.drawing.style import RC, Absent, Drawing
from tools.families.attention.points import PHASES as ATTENTION_PHASES
from tools.families.attention.points import has_attention, only_attention
from tools.families.attention.scaling import (
    matrix_share,
    memory_vs_tokens,
    time_vs_tokens,
)
from tools.families.attention.sparsity import speedup_vs_sparsity
from tools.families.attention.speed import speed_by_tier, speed_map
from tools.families.linear.costs import (
    errors_vs_size,
    memory_vs_size,
    quality_speed_vs_size,
    time_per_weight_byte_vs_size,
)
from tools.families.linear.limits import floor_share_vs_size, over_floor
from tools.families.linear.regions import less_layout_fix_vs_size, regions_vs_size
from tools.families.linear.speed import (
    phase_vs_batch,
    phase_vs_size,
    speedup_map,
)
from tools.families.linear.steps import drift_by_step, step_breakdown

MAIN = "forward_vs_N"

FIGURES: dict[str, Callable[[Results], list[Drawing]]] = {
    MAIN: lambda results: phase_vs_size(results, "forward"),
    "forward_vs_B": lambda results: phase_vs_batch(results, "forward"),
    "speedup_map": speedup_map,
    "forward_over_floor": lambda results: over_floor(results, "forward"),
    "forward_floor_vs_N": floor_share_vs_size,
    "forward_regions_vs_N": regions_vs_size,
    "forward_less_layout_fix_vs_N": less_layout_fix_vs_size,
    "forward_per_weight_byte_vs_N": time_per_weight_byte_vs_size,
    "quality_adjusted_speed_vs_N": quality_speed_vs_size,
    "backward_vs_N": lambda results: phase_vs_size(results, "backward"),
    "backward_vs_B": lambda results: phase_vs_batch(results, "backward"),
    "training_vs_N": lambda results: phase_vs_size(results, "training"),
    "training_vs_B": lambda results: phase_vs_batch(results, "training"),
    "training_over_floor": lambda results: over_floor(results, "training"),
    "step_breakdown": step_breakdown,
    "memory_vs_N": memory_vs_size,
    "errors_vs_N": errors_vs_size,
    "drift": drift_by_step,
}

ATTENTION_KINDS: dict[str, Callable[[Results, str], list[Drawing]]] = {
    "by_tier": speed_by_tier,
    "map": speed_map,
    "vs_T": time_vs_tokens,
    "memory_vs_T": memory_vs_tokens,
    "vs_sparsity": speedup_vs_sparsity,
    "matrix_share": matrix_share,
}
ATTENTION_FIGURES: dict[str, Callable[[Results], list[Drawing]]] = {
    f"attention_{phase}_{name}": functools.partial(draw, phase=phase)
    for phase in ATTENTION_PHASES
    for name, draw in ATTENTION_KINDS.items()
}


def draw_all(results: Results) -> tuple[list[Drawing], dict[str, str]]:
    """Every figure that has data, in order, and the names of the others with the reason.

    Figures of a family that was not measured are not looked for.
    """
    figures = {} if only_attention(results) else dict(FIGURES)
    figures |= ATTENTION_FIGURES if has_attention(results) else {}
    drawings: list[Drawing] = []
    absent: dict[str, str] = {}
    for name, draw in figures.items():
        try:
            with matplotlib.rc_context(RC):
                drawings += draw(results)
        except Absent as reason:
            absent[name] = str(reason)
    return drawings, absent


__all__ = ["ATTENTION_FIGURES", "FIGURES", "MAIN", "Absent", "Drawing", "draw_all"]
