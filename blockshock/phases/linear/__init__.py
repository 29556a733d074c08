"""The laboratory of linear layers: case, axes, problem, steps, training, figures."""

from blockshock.phases.family import Family
from blockshock.phases.linear import axes, figures, lessons, steps, training
from blockshock.phases.linear.case import LinearCase
from blockshock.phases.linear.problem import Problem

FAMILY = Family(
    case=LinearCase,
    phases={
        "correctness": steps.correctness,
        "forward": steps.forward,
        "backward": steps.backward,
        "training": training.training,
        "drift": steps.drift,
    },
    problem=Problem,
    build=figures.build,
    figures=figures.figures,
    rates=figures.rates,
    expand=axes.expand,
    changed=lambda layer: layer.parameters(),
    usuals=figures.usuals,
    check_all=figures.check_all,
    learn=lessons.learn,
)
