"""One model on several ranks, each with its own part of the batch, in several ways: `METHODS`.

    Method(module, *, group=None, **options)

is an `nn.Module`, a `wrapper.Wrapper`, that starts all ranks from rank 0's values. After
`finish_gradient_sync()` the gradients are the mean over the ranks.
"""

from blockshock.data_parallel.peers import TorchDDP, TorchFSDP
from blockshock.data_parallel.replicated import Bucketed, Flat, Naive, NoSync, Overlapped
from blockshock.data_parallel.sharded_optimizer import ShardedOptimizer

__all__ = ["METHODS"]

_CLASSES = (
    NoSync,
    Naive,
    Flat,
    Bucketed,
    Overlapped,
    ShardedOptimizer,
    TorchDDP,
    TorchFSDP,
)
METHODS = {cls.method: cls for cls in _CLASSES}
