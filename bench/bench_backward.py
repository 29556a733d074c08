"""What does the gradient of the input cost?

One sample is the device time of one forward and backward to the input; the weights are frozen,
on the slowest rank. The methods of a point are measured in turn, round by round, each after it has
passed its check.
"""

from blockshock.phases.linear.case import Case


def bench_backward(method, N, B, dtype, mask, options, record):
    record(Case("backward", method, N, B, dtype=dtype, mask=mask, **options))
