"""How much faster than a dense layer is one that keeps a few tiles, alone and in a model?

One sample is the device time, on one rank, of a layer's forward (`bench_forward`), of its forward
and backward to input, weight and bias (`bench_backward`), of the lists of a new mask, beside the
product by them (`bench_planning`), of the logits of a vision transformer whose MLPs are pruned
(`bench_model`), or of a training step with supermasks and without (`bench_supermask`). The methods
of a point are measured in turn, round by round, each after it has passed its check.
"""

from blockshock.phases.block_sparse.case import BlockSparseCase


def bench_forward(method, N, K, B, block, sparsity, dtype, options, record):
    case = {"dtype": dtype, **options}
    record(BlockSparseCase("forward", method, N, K, B, block, sparsity, **case))


def bench_backward(method, N, K, B, block, sparsity, dtype, options, record):
    case = {"dtype": dtype, **options}
    record(BlockSparseCase("backward", method, N, K, B, block, sparsity, **case))


def bench_planning(method, N, K, B, block, sparsity, dtype, options, record):
    case = {"dtype": dtype, **options}
    record(BlockSparseCase("planning", method, N, K, B, block, sparsity, **case))


def bench_model(method, N, K, depth, B, block, sparsity, dtype, options, record):
    case = {"dtype": dtype, "depth": depth, **options}
    record(BlockSparseCase("model", method, N, K, B, block, sparsity, **case))


def bench_supermask(method, N, K, depth, B, block, sparsity, dtype, options, record):
    case = {"dtype": dtype, "depth": depth, **options}
    record(BlockSparseCase("supermask", method, N, K, B, block, sparsity, **case))
