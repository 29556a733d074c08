"""One model on several ranks, each with its own part of the batch, in several ways: `METHODS`.

    Method(module, *, group=None, **options)

is an `nn.Module`, a `wrapper.Wrapper`, that starts all ranks from rank 0's values. After
`finish_gradient_sync()` the gradients are the mean over the ranks.
"""

from blockshock.data_parallel.replicated import NoSync

__all__ = ["METHODS"]

_CLASSES = (NoSync,)
METHODS = {cls.method: cls for cls in _CLASSES}
