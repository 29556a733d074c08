"""How fast is a tensor-parallel block with sparse attention, and how fast with dense attention?

One sample is the time of one block on the slowest rank: forward (`bench_hybrid_forward`), or
forward and backward (`bench_hybrid_backward`). All attentions of a point have the same weights and
are measured in the same rounds.

What a pattern can gain is bounded by the projections, whose operations it does not change. Causal
attention has T / (12 width) times as many as they have, forward (hidden = 8/3 width), and 7/6 of
that with the backward; twice that if not causal. At one rate of arithmetic and without sums, the
block of width 4096 at T = 32768 can become 1.8 times as fast, that of width 1024 4.1 times.
"""

from blockshock.phases.transformer.case import TransformerCase


def bench_hybrid_forward(method, width, heads, batch, T, dtype, pattern, reduce, options, record):
    case = {"dtype": dtype, "heads": heads, "pattern": pattern, "reduce": reduce, **options}
    record(TransformerCase("hybrid_forward", method, width, batch, T, **case))


def bench_hybrid_backward(method, width, heads, batch, T, dtype, pattern, reduce, options, record):
    case = {"dtype": dtype, "heads": heads, "pattern": pattern, "reduce": reduce, **options}
    record(TransformerCase("hybrid_backward", method, width, batch, T, **case))
