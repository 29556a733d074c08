"""The laboratory of data parallelism: case, axes, problem, steps, figures."""

from blockshock.phases.data_parallel import axes, figures, steps
from blockshock.phases.data_parallel.case import DataParallelCase
from blockshock.phases.data_parallel.problem import Problem
from blockshock.phases.family import Family

PHASES = {
    "correctness": steps.correctness,
    "gradients": steps.gradients,
    "training": steps.training,
    "lm": steps.lm,
}
FAMILY = Family(
    case=DataParallelCase,
    phases=PHASES,
    problem=Problem,
    build=steps.Run,
    figures=figures.figures,
    rates=figures.rates,
    expand=axes.expand,
    changed=lambda run: run.wrapper.module.parameters(),
    usuals=figures.usuals,
    # Wrappers start collectives from hooks and count on the host: a replay would not.
    timings=dict.fromkeys(PHASES, ("events", "sync")),
    benches=("lm",),
)
