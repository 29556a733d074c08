"""Which way to split a linear layer is fastest, and how far is each from the truth?

One sample is the device time, on the slowest rank, of one forward (`bench_forward`), one forward
and backward to the input with frozen weights (`bench_backward`), one training step with upkeep of
the compressed form (`bench_training`), one forward and whole backward (`bench_correctness`), or T
forwards, each on the normalised output of the one before (`bench_drift`). The methods of a point
are measured in turn, round by round, each after it has passed its check.
"""

from blockshock.phases.linear.case import LinearCase


def bench_correctness(method, N, B, dtype, mask, options, record):
    record(LinearCase("correctness", method, N, B, dtype=dtype, mask=mask, **options))


def bench_forward(method, N, B, dtype, mask, options, record):
    record(LinearCase("forward", method, N, B, dtype=dtype, mask=mask, **options))


def bench_backward(method, N, B, dtype, mask, options, record):
    record(LinearCase("backward", method, N, B, dtype=dtype, mask=mask, **options))


def bench_training(method, N, B, dtype, mask, options, record):
    record(LinearCase("training", method, N, B, dtype=dtype, mask=mask, **options))


def bench_drift(method, N, B, dtype, mask, options, record):
    record(LinearCase("drift", method, N, B, dtype=dtype, mask=mask, **options))
