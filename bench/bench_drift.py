"""How do errors grow when the output is fed back?

One sample is the device time of one chain of T forward steps, the output normalised between them,
on the slowest rank. The methods of a point are measured in turn, round by round, each after it has
passed its check.
"""

from blockshock.phases.linear.case import Case


def bench_drift(method, N, B, dtype, mask, options, record):
    record(Case("drift", method, N, B, dtype=dtype, mask=mask, **options))
