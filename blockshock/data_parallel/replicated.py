"""Methods in which every rank holds all parameters, gradients and optimizer state."""

from blockshock.data_parallel.wrapper import Wrapper


class NoSync(Wrapper):
    """Gradients stay each rank's own: one process, or the computation alone for comparison.

    module, group: as in `Wrapper`; works without a process group.
    """

    method = "none"
    alone = True

    def __init__(self, module, *, group=None):
        super().__init__(module, group)
