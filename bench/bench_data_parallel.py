"""Which way to exchange gradients is fastest, for which model and bucket, and what does it cost?

One sample is the time, on the slowest rank, of a forward, a backward and the exchange of gradients
(`bench_correctness`, `bench_gradients`), or of a training step with clipping and AdamW
(`bench_training`). `none` exchanges nothing: it is one rank's speed, measured in the same rounds.
"""

from blockshock.phases.data_parallel.case import DataParallelCase


def bench_correctness(method, width, depth, batch, T, dtype, bucket_mib, options, record):
    case = {"dtype": dtype, "bucket_mib": bucket_mib, **options}
    record(DataParallelCase("correctness", method, width, depth, batch, T, **case))


def bench_gradients(method, width, depth, batch, T, dtype, bucket_mib, options, record):
    case = {"dtype": dtype, "bucket_mib": bucket_mib, **options}
    record(DataParallelCase("gradients", method, width, depth, batch, T, **case))


def bench_training(method, width, depth, batch, T, dtype, bucket_mib, options, record):
    case = {"dtype": dtype, "bucket_mib": bucket_mib, **options}
    record(DataParallelCase("training", method, width, depth, batch, T, **case))
