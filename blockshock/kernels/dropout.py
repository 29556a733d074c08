"""Which weights of an attention dropout keeps.

    r = Philox 4×32-10 (key: seed; counter: key token, query token, row, 0), its first word
    kept where r >= rate · 2^32,    row = batch · heads + head

Counter-based random numbers (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
forward and backward ask for the same ones in any order, and nothing is stored. The kernels ask
Triton's `tl.philox`; `kept_reference` is the same in plain PyTorch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 10
KEYS = 0x9E3779B9, 0xBB67AE85
FACTORS = 0xD2511F53, 0xCD9E8D57
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """Each weight is kept with probability 1 − rate, and then divided by it.

    seed: a number, or an int64 tensor of one element, which is read when the weights are dropped.
    """

    rate: float = 0.0
    seed: int | Tensor = 0

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ValueError(f"dropout = {self.rate} must be 0 or more and less than 1")
        if isinstance(self.seed, Tensor):
            if self.seed.dtype != torch.int64 or self.seed.numel() != 1:
                raise ValueError(
                    f"seed of {self.seed.dtype} {tuple(self.seed.shape)}: an int64 tensor of one "
                    "element is needed, or a number"
                )
            return
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not whole or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed!r} must be a whole number from 0 to 2^63 - 1")

    @property
    def threshold(self) -> int:
        """Words below it drop a weight."""
        return round(self.rate * 2**32)

    @property
    def factor(self) -> float:
        """What a weight that is kept is multiplied by."""
        return 1 / (1 - self.rate)


def kept_reference(
    dropout: Dropout, batch: int, heads: int, Tq: int, Tk: int, device="cpu"
) -> Tensor:
    """Whether each weight is kept: bool [batch, heads, Tq, Tk]."""
    row = torch.arange(batch * heads, device=device).view(-1, 1, 1)
    query = torch.arange(Tq, device=device).view(-1, 1)
    c0, c1, c2, c3 = torch.broadcast_tensors(
        torch.arange(Tk, device=device), query, row, torch.zeros_like(row)
    )
    seed = int(dropout.seed)
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(FACTORS[0], c0), _product(FACTORS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + KEYS[0] & WORD, k1 + KEYS[1] & WORD
    return (c0 >= dropout.threshold).view(batch, heads, Tq, Tk)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of two words, in int64 without overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
