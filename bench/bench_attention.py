"""Which kernel of attention is fastest, on a full mask, a causal one, and on sparse patterns?

One sample is the device time of one forward (`bench_forward`), or of one forward and backward to
q, k and v (`bench_forward_backward`), on one rank. The methods of a point are measured in turn,
round by round, each after it has passed its check.
"""

from blockshock.phases.attention.case import AttentionCase


def bench_forward(method, batch, heads, Tq, Tk, D, dtype, causal, pattern, options, record):
    case = {"Tk": Tk, "dtype": dtype, "causal": causal, "pattern": pattern, **options}
    record(AttentionCase("forward", method, batch, heads, Tq, D, **case))


def bench_forward_backward(
    method, batch, heads, Tq, Tk, D, dtype, causal, pattern, options, record
):
    case = {"Tk": Tk, "dtype": dtype, "causal": causal, "pattern": pattern, **options}
    record(AttentionCase("forward_backward", method, batch, heads, Tq, D, **case))
