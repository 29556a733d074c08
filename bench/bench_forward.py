"""Which method multiplies fastest?

One sample is the device time of one forward, Y = X Wᵀ + b, with nothing recorded for a backward,
on the slowest rank. The methods of a point are measured in turn, round by round, each after it has
passed its check.
"""

from blockshock.phases.linear.case import Case


def bench_forward(method, N, B, dtype, mask, options, record):
    record(Case("forward", method, N, B, dtype=dtype, mask=mask, **options))
