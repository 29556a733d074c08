"""Methods that go wrong in the ranks, each in one way, for the tests of the laboratory.

`measure_point` stands in for the engine's: it registers them in the rank, then measures.
"""

import os
import signal
import time

import torch

from blockshock.distributed import collectives
from blockshock.linear import METHODS
from blockshock.linear.dense import DenseTPRow
from blockshock.phases import engine


class Faulty(DenseTPRow):
    """Row-parallel, until its fault comes."""

    def fault(self):
        """What goes wrong, before a forward; on rank 1 only."""

    def forward(self, x):
        if collectives.group_rank() == 1:
            self.fault()
        return super().forward(x)


class Raises(Faulty):
    def fault(self):
        raise KeyError("no such shard")


class Exits(Faulty):
    def fault(self):
        os._exit(7)


class Hangs(Faulty):
    def fault(self):
        time.sleep(3600)


class Killed(Faulty):
    def fault(self):
        os.kill(os.getpid(), signal.SIGKILL)


class OutOfMemory(Faulty):
    def fault(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.")


class Wrong(Faulty):
    """Half the answer is missing: a term that one rank forgot."""

    def fault(self):
        with torch.no_grad():
            self.weight.zero_()


class OtherBits(Faulty):
    """The ranks return different bits, each as good as the other."""

    def forward(self, x):
        y = super().forward(x)
        return y * (1 + collectives.group_rank() * torch.finfo(y.dtype).eps)


FAULTS = {
    cls.__name__.lower(): cls
    for cls in (Raises, Exits, Hangs, Killed, OutOfMemory, Wrong, OtherBits)
}


def measure_point(cases, options):
    """engine.measure_point in a rank that knows the faulty methods."""
    METHODS.update(FAULTS)
    return MEASURE_POINT(cases, options)


MEASURE_POINT = engine.measure_point
