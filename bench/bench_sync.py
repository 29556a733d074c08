"""With how few syncs can tensor parallelism train and decode, and what does each one cost?

One sample is the time, on the slowest rank, of a training step (`bench_sync`), or of one token
through the decoder with a cache before it (`bench_decode`). Every plan has the same weights.
"""

from blockshock.phases.transformer.case import TransformerCase


def bench_sync(method, width, depth, batch, T, dtype, reduce, options, record):
    case = {"dtype": dtype, "reduce": reduce, **options}
    record(TransformerCase("sync", method, width, batch, T, depth, **case))


def bench_decode(method, width, depth, batch, T, dtype, reduce, options, record):
    case = {"dtype": dtype, "reduce": reduce, **options}
    record(TransformerCase("decode", method, width, batch, T, depth, **case))
