"""How fast is a tensor-parallel block with sparse attention, and how fast with dense attention?

One sample is the time of one block on the slowest rank: forward (`bench_hybrid_forward`), or
forward and backward (`bench_hybrid_backward`). All attentions of a point have the same weights and
are measured in the same rounds.

What a pattern can gain at most is in docs/tensor_parallel.md.
"""

from blockshock.phases.transformer.case import TransformerCase


def bench_hybrid_forward(method, width, heads, batch, T, dtype, pattern, reduce, options, record):
    case = {"dtype": dtype, "heads": heads, "pattern": pattern, "reduce": reduce, **options}
    record(TransformerCase("hybrid_forward", method, width, batch, T, **case))


def bench_hybrid_backward(method, width, heads, batch, T, dtype, pattern, reduce, options, record):
    case = {"dtype": dtype, "heads": heads, "pattern": pattern, "reduce": reduce, **options}
    record(TransformerCase("hybrid_backward", method, width, batch, T, **case))
