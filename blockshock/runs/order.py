"""In which order a run reads its data: each epoch in a new one, by the seed alone."""

import torch


class Order:
    """order[sequence]: which of `count` pieces the sequence with this number is, from 0 on.

    Each epoch reads every piece once. No state but the permutation at hand: a run goes on from any
    number. Raises IndexError for a negative one.
    """

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __getitem__(self, sequence: int) -> int:
        epoch, place = divmod(sequence, self.count)
        if epoch < 0:
            raise IndexError(f"sequence {sequence}: they are counted from 0")
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._order = torch.randperm(self.count, generator=generator)
            self._epoch = epoch
        return int(self._order[place])
