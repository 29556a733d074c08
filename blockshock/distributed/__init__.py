"""Several ranks: the processes, ways to sum over them, and the autograd functions built on both."""

from blockshock.distributed.ranks import RankFailure, Ranks, note, open_ranks

__all__ = ["RankFailure", "Ranks", "note", "open_ranks"]
