"""Several ranks: the processes, ways to sum over them, and the autograd functions built on both."""

from blockshock.distributed.here import note, noting
from blockshock.distributed.ranks import RankFailure, Ranks, open_ranks

__all__ = ["RankFailure", "Ranks", "note", "noting", "open_ranks"]
