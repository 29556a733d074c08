"""The laboratory of attention: case, problem, steps, figures. Its axes are its case's fields."""

from blockshock.phases.attention import figures, steps
from blockshock.phases.attention.case import AttentionCase
from blockshock.phases.attention.problem import AttentionProblem
from blockshock.phases.family import Family

FAMILY = Family(
    case=AttentionCase,
    phases=steps.PHASES,
    problem=AttentionProblem,
    build=figures.build,
    figures=figures.figures,
    rates=figures.rates,
    ranks=1,
)
