"""Which attention kernel, with which way to exchange gradients, trains a language model fastest?

One sample is the time, on the slowest rank, of a training step. Before it, each case trains `steps`
steps from the same first weights on the same text, and its losses are kept.
"""

from blockshock.phases.data_parallel.case import DataParallelCase


def bench_lm(method, attention, width, depth, batch, T, dtype, options, record):
    case = {"attention": attention, "dtype": dtype, **options}
    record(DataParallelCase("lm", method, width, depth, batch, T, **case))
