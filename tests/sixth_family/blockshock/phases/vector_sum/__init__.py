"""The laboratory of vector sums."""

from blockshock.phases.family import Family
from blockshock.phases.vector_sum import figures, steps
from blockshock.phases.vector_sum.case import VectorSumCase
from blockshock.phases.vector_sum.problem import Problem

FAMILY = Family(
    case=VectorSumCase,
    phases={"forward": steps.forward, "twice": steps.twice},
    problem=Problem,
    build=figures.build,
    figures=figures.figures,
    rates=figures.rates,
)
