"""Is a sum in two halves slower than one sum? One sample is the time of one sum, or of two."""

from blockshock.phases.vector_sum.case import VectorSumCase


def bench_forward(method, n, dtype, options, record):
    record(VectorSumCase("forward", method, n, dtype=dtype, **options))


def bench_twice(method, n, dtype, options, record):
    record(VectorSumCase("twice", method, n, dtype=dtype, **options))
