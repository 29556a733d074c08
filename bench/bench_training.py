"""What does a training step cost, upkeep of the compressed form included?

One sample is the device time of one step: forward, loss, backward, optimizer, upkeep,
on the slowest rank. The methods of a point are measured in turn, round by round, each after it has
passed its check.
"""

from blockshock.phases.linear.case import Case


def bench_training(method, N, B, dtype, mask, options, record):
    record(Case("training", method, N, B, dtype=dtype, mask=mask, **options))
