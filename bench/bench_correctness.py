"""How far is each method from the truth, for the output and every gradient?

One sample is the device time of one forward and whole backward (dX, dW, db),
on the slowest rank. The methods of a point are measured in turn, round by round, each after it has
passed its check.
"""

from blockshock.phases.linear.case import Case


def bench_correctness(method, N, B, dtype, mask, options, record):
    record(Case("correctness", method, N, B, dtype=dtype, mask=mask, **options))
